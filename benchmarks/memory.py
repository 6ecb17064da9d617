"""Does a model of this size read, predict and sleep on this machine's CPU, and in how much memory? Random weights in bfloat16.

    python benchmarks/memory.py [MODEL [TOKENS]]

TOKENS are read, slept on, and then predicted one at a time. Fails if more than 8 GiB were held at once (Linux).
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import zoo

LIMIT = 8 * 2**30
PREDICTED = 4


def most_held() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


@torch.no_grad()
def main(name: str, tokens: int) -> None:
    seconds, held = {}, {}
    started = time.perf_counter()

    def done(step: str) -> None:
        nonlocal started
        seconds[step], held[step] = round(time.perf_counter() - started, 1), most_held()
        print(f"{step:<8} {seconds[step]:7.1f} s   at most {held[step] / 2**30:.2f} GiB held so far", flush=True)
        started = time.perf_counter()

    model = zoo.create(name, dtype=torch.bfloat16)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    done("create")
    logits = model(ids).logits
    done("read")
    state = model.consolidate(ids)
    done("sleep")
    for _ in range(PREDICTED):
        logits, state = model(logits[:, -1:].argmax(-1), state)
    done("predict")
    if not logits.isfinite().all() or not all(fast is None or fast.isfinite().all() for fast in state.fast):
        sys.exit(f"{name}: not all numbers are finite")
    line = {"model": name, "tokens": tokens, "predicted": PREDICTED, "seconds": seconds, "bytes": held}
    line |= {"device": platform.processor() or platform.machine(), "torch": torch.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    with (Path(__file__).parent / "results" / "memory.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if held["predict"] > LIMIT:
        sys.exit(f"{name}: more than {LIMIT / 2**30:.0f} GiB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "jet2b-sleep6", int(sys.argv[2]) if len(sys.argv) > 2 else 128)

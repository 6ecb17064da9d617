"""Memory and time of reading, sleeping and predicting with a large model on a CPU, with random weights in bfloat16.

    python -m benchmarks.memory [MODEL [TOKENS]]

Reads TOKENS tokens, sleeps on them, then predicts one token at a time. Fails above 8 GiB of peak memory (Linux).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import zoo
from benchmarks.measure import peak_memory, quartiles, record

LIMIT = 8 * 2**30
PREDICTED = 4


@torch.no_grad()
def main(name: str, tokens: int) -> None:
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()

    def done(step: str) -> None:
        nonlocal started
        peak, taken = peak_memory() / 2**30, time.perf_counter() - started
        print(f"{step:<8} {taken:7.1f} s   peak memory {peak:.2f} GiB", flush=True)
        case = f"{name}, {tokens} tokens, bfloat16: {step}"
        rows.append({"case": case, "unit": "GiB", "times": {"ours": quartiles([peak])}, "ratios": {}, "seconds": round(taken, 1)})
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
    done(f"predict {PREDICTED}")
    if not logits.isfinite().all() or not all(fast is None or fast.isfinite().all() for fast in state.fast):
        sys.exit(f"{name}: not all numbers are finite")
    record("memory", rows)
    if peak_memory() > LIMIT:
        sys.exit(f"{name}: more than {LIMIT / 2**30:.0f} GiB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "jet2b-sleep6", int(sys.argv[2]) if len(sys.argv) > 2 else 128)

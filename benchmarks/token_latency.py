"""What does a sleep cost those who wait for a token? Time per token with and without sleeps, taking turns within one run.

    python benchmarks/token_latency.py [session|pool] ...

session: one stream; the next token while a sleep runs in the background, beside the same token without one.
pool: eight conversations with a 50M model, which sleep between turns, while others speak; beside the same without sleeps.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import zoo

MODEL = {"model": "depo10-sleep4", "d_model": 576, "blocks": {"attn": {"heads": 9}, "jet": {"heads": 9}}}
ROUNDS = 6


def milliseconds(seconds: list[float]) -> dict[str, float]:
    values = 1000 * np.array(seconds)
    return {"p50": float(np.median(values)), "p99": float(np.percentile(values, 99)), "tokens": len(values)}


def session() -> dict[str, Any]:
    """The next token beside a sleep in the background, and without one."""
    model = zoo.create(**MODEL)
    window = model.config.window or 1
    times: dict[str, list[float]] = {"awake": [], "beside a sleep": []}
    sleeps: dict[str, list[float]] = {"alone": [], "beside tokens": []}
    prompt = torch.zeros(1, window // 2, dtype=torch.long)
    for _ in range(ROUNDS):
        for kind, seconds in times.items():
            stream = zoo.Session(model)
            stream.feed(prompt)
            started = time.perf_counter()
            if kind == "awake":
                stream.fork().sleep()
                sleeps["alone"].append(time.perf_counter() - started)
            else:
                stream.sleep(wait=False)
            nap = stream._nap
            for _ in range(window - window // 2):
                if nap is not None and nap.ended.is_set():
                    break
                before = time.perf_counter()
                stream.feed(prompt[:, :1])
                seconds.append(time.perf_counter() - before)
            if nap is not None:
                nap.ended.wait()
                sleeps["beside tokens"].append(nap.seconds)
    return {"token": {k: milliseconds(v) for k, v in times.items()}, "sleep": {k: milliseconds(v) for k, v in sleeps.items()}}


def pool(streams: int = 8, turns: int = 4) -> dict[str, Any]:
    """Eight conversations: turns of thirty tokens and pauses about as long, in which the stream sleeps while others speak."""
    times: dict[str, list[float]] = {"without sleeps": [], "sleeps in the gaps": []}
    sleeps = 0
    models = {"without sleeps": zoo.create(**MODEL, window=1000), "sleeps in the gaps": zoo.create(**MODEL)}
    for _ in range(ROUNDS // 2):
        for kind, model in models.items():
            with zoo.SessionPool(model, streams, when="full" if kind == "without sleeps" else "idle(0)") as served:
                talk = partial(_converse, served, turns)
                with ThreadPoolExecutor(streams) as threads:
                    for seconds in threads.map(talk, range(streams)):
                        times[kind] += seconds
                sleeps += served.sleeps
    return {"token": {k: milliseconds(v) for k, v in times.items()}, "sleeps": sleeps}


def _converse(served: zoo.SessionPool, turns: int, seed: int) -> list[float]:
    """Seconds between the tokens of each turn."""
    stream, chance, waits = served.open(), random.Random(seed), []
    for _ in range(turns):
        began = at = time.perf_counter()
        for n, _ in enumerate(stream.generate(torch.zeros(1, 8, dtype=torch.long), 30)):
            now = time.perf_counter()
            if n:
                waits.append(now - at)
            at = now
        time.sleep((at - began) * chance.uniform(0.5, 1.5))
    return waits


def main(kinds: list[str]) -> None:
    for kind in kinds:
        figures = {"session": session, "pool": pool}[kind]()
        table = Table("", "p50 ms", "p99 ms", "tokens", title=f"{kind}, {torch.get_num_threads()} threads")
        for name, row in figures["token"].items():
            table.add_row(name, f"{row['p50']:.1f}", f"{row['p99']:.1f}", str(row["tokens"]))
        (first, second) = figures["token"].values()
        ratio = {"p99_over_quiet_p50": second["p99"] / first["p50"], "p50_over_quiet_p50": second["p50"] / first["p50"]}
        Console().print(table, ratio, {k: v for k, v in figures.items() if k != "token"})
        line = {"kind": kind, **figures, **ratio, "model": MODEL, "threads": torch.get_num_threads()}
        line |= {
            "device": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        with (Path(__file__).parent / "results" / "token_latency.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["session", "pool"])

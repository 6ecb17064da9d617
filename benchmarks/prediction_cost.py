"""Does a predicted token cost more when the model sleeps longer? Median milliseconds per token and per sleep against N.

    python benchmarks/prediction_cost.py [MODEL]

The N take turns within one run, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import zoo

LOOPS = (1, 2, 4, 8)
ROUNDS = 40
TOKENS = 24


def main(name: str) -> None:
    torch.set_num_threads(1)
    models = {n: zoo.create(f"{name}-sleep{n}") for n in LOOPS}
    window = models[1].config.window or 1
    prompt = torch.zeros(1, window, dtype=torch.long)
    seconds: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in LOOPS} for kind in ("token", "sleep")}
    for _ in range(ROUNDS):
        for n, model in models.items():
            session = zoo.Session(model)
            session.feed(prompt)
            started = time.perf_counter()
            session.sleep()
            slept = time.perf_counter()
            list(session.generate(prompt[:, :1], TOKENS))
            seconds["sleep"][n].append(slept - started)
            seconds["token"][n].append((time.perf_counter() - slept) / TOKENS)
    milliseconds = {kind: {n: 1000 * statistics.median(times) for n, times in by_n.items()} for kind, by_n in seconds.items()}
    table = Table("N", "ms per token", "over N = 1", "ms per sleep", "over N = 1", title=f"{name}, window {window}, one stream, one thread")
    for n in LOOPS:
        token, sleep = milliseconds["token"], milliseconds["sleep"]
        table.add_row(str(n), f"{token[n]:.3f}", f"{token[n] / token[1]:.2f}", f"{sleep[n]:.2f}", f"{sleep[n] / sleep[1]:.2f}")
    Console().print(table)
    line = {"model": name, "milliseconds": milliseconds, "device": platform.processor() or platform.machine(), "torch": torch.__version__}
    with (Path(__file__).parent / "results" / "prediction_cost.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"date": datetime.now(UTC).strftime("%Y-%m-%d")}) + "\n")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["gdn4"]))

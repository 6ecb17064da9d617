"""Every Triton kernel and configuration against the step recurrence in float64, then its time.

Rows are checked in worker processes (`check.py`), because a kernel that crashes takes its process with it. Without a GPU, Triton's
interpreter runs one configuration of each operator at small sizes.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.check import sizes
from benchmarks.gpu.sheet import Case, Row, read, timed
from benchmarks.gpu.stamp import group
from benchmarks.measure import HERE
from zoo.doctor import call
from zoo.kernels import tuning
from zoo.kernels.common.examples import example
from zoo.kernels.dispatch import kernels, operators

TOOLS = ("triton",)
PATIENCE = 60  # seconds that one row may take
Answers = queue.SimpleQueue[tuple[str, Row]]


def cases(dry: bool, folder: Path) -> Iterator[Case]:
    """Start the workers, then yield a case for each row, which waits for its answer."""
    measured = {row["case"] for row in (read(folder / "kernels.json") or {"rows": []})["rows"]}
    rows = wanted(dry)
    todo = [row for row in rows if row_name(row) not in measured]
    workers = 1 if dry else max(1, min(14, (os.cpu_count() or 2) - 2))
    answers: Answers = queue.SimpleQueue()
    for first in range(min(workers, len(todo))):
        threading.Thread(target=check_all, args=(todo[first::workers], answers, dry), daemon=True).start()
    found: dict[str, Row] = {}

    def take(name: str) -> Row:
        while name not in found:
            done, row = answers.get()
            found[done] = row
        return found[name] | ({"note": "interpreted"} if dry and "note" not in found[name] else {})

    for row in rows:
        yield row_name(row), partial(take, row_name(row))
    for row in rows if not dry else ():
        if row["config"]:
            yield f"time of {row_name(row)}", partial(time_of, row)


def wanted(dry: bool) -> list[tuning.Row]:
    """Return the rows to check: each operator with its default configurations, and those of this GPU's architecture.

    Those that compete with others of their group come first.
    """
    arch = 90 if dry else tuning.architecture(torch.device("cuda", 0))
    table = [row for row in tuning.table() if row["arch"] == arch]
    defaults = [
        {"kernel": operator, "arch": arch, "dtype": dtype, "shape": {}, "config": {}}
        for operator in operators.names()
        if f"{operator}.triton" in kernels
        for dtype in ("float32", "bfloat16")
    ]
    if not dry:
        competing = Counter(map(group, table))
        return defaults + sorted(table, key=lambda row: competing[group(row)] == 1)
    first = {row["kernel"].split(".")[0]: row for row in reversed(table) if row["dtype"] == "bfloat16"}
    return [row for row in defaults if row["dtype"] == "float32"] + list(first.values())


def row_name(row: tuning.Row) -> str:
    return tuning.row_name(row) if row["config"] else f"{row['kernel']}, default, {row['dtype']}"


def check_all(rows: list[tuning.Row], answers: Answers, dry: bool) -> None:
    """Check the rows one after another, in a new worker process after each one that died or lost the CUDA context."""
    rest = list(rows)
    while rest:
        command = [sys.executable, "-m", "benchmarks.gpu.check", json.dumps(rest)]
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
        worker = subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
        assert worker.stdout is not None
        while rest:
            alarm = threading.Timer(PATIENCE, worker.kill)
            alarm.start()
            line = worker.stdout.readline()
            alarm.cancel()
            if not line:
                break
            answers.put((row_name(rest.pop(0)), json.loads(line)))
        status = worker.wait()
        if rest and status != 0 and not line:
            answers.put((row_name(rest.pop(0)), {"right": False, "note": f"the process died with status {status}"}))


def time_of(row: tuning.Row) -> Row:
    """Time the row's operator under its configuration, forward and backward; its other kernels run under their defaults."""
    operator = row["kernel"].split(".")[0]
    shape = {"T": 2048, **sizes(row, False)}
    inputs = example(operator, dtype=getattr(torch, row["dtype"]), device="cuda", **shape)
    backward = shape["T"] > 1 and operator != "gdn_step"

    def step() -> Any:
        with tuning.forced(row), torch.set_grad_enabled(backward):
            results = call(operator, inputs, "triton")
            if backward:
                torch.autograd.grad(results, list(inputs.values()), [torch.ones_like(y) for y in results], allow_unused=True)
            return results

    return timed({"ours": step}) | {"note": "forward and backward" if backward else "a token"}

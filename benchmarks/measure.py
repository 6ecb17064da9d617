"""Common code of all benchmarks: alternating contenders, ratios with quartiles, rows as JSON lines, tables.

A row is the result of one benchmark (`question`) for one case:

    {"question": "prefill", "case": "mamba130m, 1 x 512", "unit": "ms", "times": {"ours": [25 %, median, 75 %], "transformers": [...]},
     "ratios": {"transformers": [25 %, median, 75 %]}, "target": 1.3, "device": ..., "threads": ..., "commit": ..., "date": ...}

The contenders are compared with "ours", or with the one that the row names: `"ours": "N = 1"`. If that one has no time, there is no ratio.
A ratio is the time of a contender divided by ours in the same round; above 1, ours is faster.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

HERE = Path(__file__).parent
RESULTS = Path(os.environ.get("ZOO_BENCHMARK_RESULTS", HERE / "results"))
PLOTS = HERE.parent / "docs" if RESULTS == HERE / "results" else RESULTS
OURS = "ours"
TURNS = tuple(map(int, os.environ.get("ZOO_BENCHMARK_TURNS", "").split()))
"""Pipes to read a turn from and to end it with, where two commits are compared: one process works at a time, and only ours is timed."""
MINIMUM = 0.1 if TURNS else 0.02  # seconds per measurement
PATIENCE = 6  # seconds after which no further round starts
LIMIT = "limit"  # the contender that does only what is unavoidable, such as reading the weights once
SCALE = {"s": 1.0, "ms": 1e3, "us": 1e6}
console = Console(width=None if Console().is_terminal else 160)


def compare(
    case: str,
    contenders: Mapping[str, Callable[[], Any] | None],
    *,
    ours: str = OURS,
    rounds: int = 7,
    unit: str = "ms",
    per: int = 1,
    target: float | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Time the contenders in alternation and return a row. No round starts after 6 s.

    Args:
        contenders: functions to time, by name; the tensors that they return are compared if there is a tolerance.
            None: not installed here.
        ours: name of the contender that the others are compared with. If it is missing, they are timed and compared with nothing.
        rounds: number of rounds; in each, every contender runs for at least 20 ms.
        per: divisor of the times, such as the number of tokens of one call.
        target: intended ratio of every other contender.
        tolerance: largest difference between the results of ours and another contender, relative to the largest entry of ours.
            A contender above it is not timed, and the row records the problem.
    """
    if TURNS:
        rounds, contenders = 5, {name: work for name, work in contenders.items() if name == ours}
    problems = {name: "not installed" for name, work in contenders.items() if work is None}
    installed = {name: work for name, work in contenders.items() if work is not None}
    errors, results, first = {}, {}, {}
    for name, work in installed.items():
        started = time.perf_counter()
        results[name] = work()
        first[name] = time.perf_counter() - started
    for name in installed:
        if tolerance is not None and ours in installed and name != ours:
            errors[name] = difference(results[name], results[ours])
            if not errors[name] <= tolerance:
                problems[name] = f"differs by {errors[name]:.0e}"
    timed = {name: work for name, work in installed.items() if name not in problems}
    calls = {name: math.ceil(MINIMUM / seconds(work)) if first[name] < 1 else 1 for name, work in timed.items()}
    times: dict[str, list[float]] = {name: [] for name in timed}
    started = time.perf_counter()
    for turn in range(rounds):
        if turn and not TURNS and time.perf_counter() - started > PATIENCE:
            rounds = turn
            break
        take_turns()
        for name in list(timed)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds(timed[name], calls[name]))
    row: dict[str, Any] = {"case": case, "unit": unit, "rounds": rounds, "target": target, "ours": ours, "ratios": {}}
    row["times"] = {name: quartiles(SCALE[unit] / per * np.array(taken)) for name, taken in times.items()}
    if ours in times:
        row["ratios"] = {name: quartiles(np.array(taken) / np.array(times[ours])) for name, taken in times.items() if name != ours}
        row |= {"taken": times[ours]} if TURNS else {}
    return row | ({"errors": errors} if errors else {}) | ({"problems": problems} if problems else {})


def take_turns() -> None:
    """Let the process of the other commit work until its next turn ends, if there is one."""
    if TURNS:
        reader, writer = TURNS
        os.write(writer, b".")
        os.read(reader, 1)


def seconds(work: Callable[[], Any], calls: int = 1) -> float:
    """Return the mean time of a call of `work`, including its work on a GPU."""
    _wait()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    _wait()
    return (time.perf_counter() - started) / calls


def quartiles(values: Any) -> list[float]:
    """Return the 25 %, 50 % and 75 % quantiles, rounded to four digits."""
    return [float(f"{value:.4g}") for value in np.percentile(np.asarray(values, dtype=float), [25, 50, 75])]


def difference(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of `want`."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def machine() -> dict[str, Any]:
    """Return the hardware and software of a measurement."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: found for name in ("torch", "triton", "transformers", "onnxruntime") if (found := _version(name))},
        "commit": _commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def _commit() -> str | None:
    """Return the commit of this tree; None where git or the history is missing."""
    if shutil.which("git") is None:
        return None
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return head.stdout.strip() or None


def record(question: str, rows: list[dict[str, Any]]) -> None:
    """Append the rows to results/<question>.jsonl and print them as a table."""
    stamp = machine()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{question}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"question": question, **row, **stamp}) + "\n" for row in rows)
    console.print(table(question, rows, stamp))
    if TURNS:
        raise SystemExit  # pictures need the other contenders


def table(question: str, rows: list[dict[str, Any]], stamp: dict[str, Any]) -> Table:
    """Return a table of the rows, ratios first."""
    made = Table(
        title=f"{question}: {stamp['device']}, {stamp['threads']} threads, torch {stamp['versions']['torch']}, load {stamp['load']}"
    )
    for name in HEADINGS:
        made.add_column(name, justify="left" if name in HEADINGS[:2] else "right")
    for row in rows:
        for line in cells(row):
            made.add_row(*line)
    return made


HEADINGS = ("case", "compared with", "ratio (quartiles)", "target", "ours", "theirs", "errors")


def cells(row: dict[str, Any]) -> list[list[str]]:
    """Return the table lines of a row, one for each contender but ours."""
    times, errors, problems, lines = row["times"], row.get("errors", {}), row.get("problems", {}), []
    ours = row.get("ours", OURS)
    shown = {name: f"{time[1]:.4g} {row['unit']}" for name, time in times.items()}
    for name in [name for name in times | problems if name != ours] or [""]:
        lines.append(
            [
                row["case"],
                name,
                spread(row["ratios"][name]) if name in row["ratios"] else problems.get(name, ""),
                f"{row['target']:g}" if row.get("target") is not None and name != LIMIT else "",
                shown.get(ours) or problems.get(ours, "not measured"),
                shown.get(name, ""),
                " / ".join(f"{errors[side]:.0e}" for side in (ours, name) if side in errors),
            ]
        )
    return lines


def spread(ratio: list[float]) -> str:
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def peak_memory() -> int:
    """Return the peak memory of this process in bytes (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(encoding="utf-8"), re.MULTILINE) if facts.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if TURNS:
    os.read(TURNS[0], 1)  # the other process begins

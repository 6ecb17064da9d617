"""The results of one stage: rows in one JSON file, rewritten after each row, whole or not at all.

    {"stage": "decode", "dry": false, "complete": true, "seconds": 61.2, "device": ..., "driver": ..., "versions": {...},
     "running": null, "rows": [{"case": "hybrid, batch 1", "eager ms": 7.1, ..., "commit": ..., "date": ...}]}

A row is flat: what it measured, by the heading of its column. Text in place of a number says why there is none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.measure import HERE, compare, machine
from zoo.files import replacing
from zoo.signals import StoppedError

Row = dict[str, Any]
Case = tuple[str, Callable[[], Row]]
PACKED = HERE.parent / "build" / "gpu" / "site"
POISONED = 75  # exit status of a stage whose CUDA context is lost: it starts again in a new process
LOST = (  # what CUDA says when no later call can succeed
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "uncorrectable",
    "captur",  # a capture that fails leaves the process on the stream of the capture
)
HIDDEN = {"quartiles", "commit", "date"}


class Sheet:
    """The file of a stage.

    Args:
        path: the file, which may hold the rows of an earlier call.
    """

    def __init__(self, path: Path, dry: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = read(path) or {"stage": path.stem, "seconds": 0.0, "running": None, "rows": []}
        about = machine()
        self.stamp = {"commit": about["commit"] or _packed_commit(), "date": about["date"]}
        self.content |= {"dry": dry, "complete": False, "device": about["device"], "driver": _driver(), "versions": about["versions"]}

    def fill(self, cases: Iterable[Case]) -> None:
        """Measure the cases that have no row yet. One during which an earlier call was stopped comes last.

        Raises:
            SystemExit: with the status POISONED, after a row that lost the CUDA context.
        """
        measured = {row["case"] for row in self.content["rows"]}
        pending = sorted((case for case in cases if case[0] not in measured), key=lambda case: case[0] == self.content["running"])
        for name, work in pending:
            self._write(running=name)
            started = time.perf_counter()
            try:
                row, lost = work(), False
                synchronize()
            except StoppedError:  # `running` stays, so the next call resumes the case
                raise
            except Exception as error:  # a compiler, a driver or a peer may raise anything, and the table must show it
                row, lost = {"note": reason(error)}, poisoned(error)
            self.content["rows"].append({"case": name, **row, **self.stamp})
            self.content["seconds"] = round(self.content["seconds"] + time.perf_counter() - started, 2)
            self._write(running=None)
            if lost:
                raise SystemExit(POISONED)
        self._write(complete=True)

    def _write(self, **changes: Any) -> None:
        self.content |= changes
        with replacing(self.path) as file:
            file.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any] | None:
    """Return the content of a stage's file; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def timed(contenders: Mapping[str, Callable[[], Any]], *, per: int = 1, tolerance: float | None = None) -> Row:
    """Return the median milliseconds of each contender, ours first, and the ratio of each peer's time to ours.

    Args:
        per: divisor of the times, such as the number of tokens of a call.
        tolerance: as in `benchmarks.measure.compare`.
    """
    row: Row = {f"{name} ms": None for name in contenders}
    working = {}
    for name, work in contenders.items():
        try:
            work()
            synchronize()  # what a kernel of this contender raises must not cost another one
            working[name] = work
        except Exception as error:
            if poisoned(error):
                raise RuntimeError(f"{name}: {error}") from error
            row[f"{name} ms"] = reason(error)
    ours = next(iter(contenders))
    found = compare("", working, ours=ours, rounds=5, per=per, tolerance=tolerance)
    row |= {f"{name} ms": why for name, why in found.get("problems", {}).items()}
    row |= {f"{name} ms": quartiles[1] for name, quartiles in found["times"].items()}
    row |= {f"{name} / {ours}": ratio[1] for name, ratio in found["ratios"].items()}
    return row | {f"error of {name}": error for name, error in found.get("errors", {}).items()} | {"quartiles": found["times"]}


def ours_first(cases: Iterable[tuple[str, Callable[..., Row]]], alone: Iterable[Case] = ()) -> list[Case]:
    """Return each case without its peers, those of `alone`, and each case beside its peers.

    A peer may compile for minutes; by then, our times are written.
    """
    cases = list(cases)
    without = [(name, partial(measure, peers=False)) for name, measure in cases]
    return [*without, *alone, *((f"{name}, beside peers", partial(measure, peers=True)) for name, measure in cases)]


def beside_limit(row: Row, column: str, milliseconds: float | None) -> Row:
    """Return the row with the least time that the hardware allows, and `column` as a multiple of it."""
    if milliseconds is None:
        return row | {"limit ms": "run denominators first"}
    measured = row.get(column)
    ratio = {"times the limit": measured / milliseconds} if isinstance(measured, float) else {}
    return row | {"limit ms": milliseconds, **ratio}


def reason(error: BaseException) -> str:
    """Return one line that says why there is no number."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def poisoned(error: BaseException) -> bool:
    """Return whether the CUDA context of this process is lost, so that every later call would fail."""
    if any(words in str(error) for words in LOST):
        return True
    try:
        synchronize()
    except Exception:
        return True
    return False


def synchronize() -> None:
    """Wait for the GPU, if there is one; errors of what it ran are raised here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(content: Mapping[str, Any]) -> Table:
    """Return the rows of a stage as a table."""
    rows = content["rows"]
    commits, dates = (sorted({str(row[key]) for row in rows}) for key in ("commit", "date"))
    facts = [content["device"], f"driver {content['driver']}", *(f"{name} {value}" for name, value in content["versions"].items())]
    state = "DRY, no figures of a GPU: " if content["dry"] else ""
    title = f"{state}{content['stage']}: {', '.join(facts)}, commit {'/'.join(commits)}, {'/'.join(dates)}"
    made = Table(title=title + ("" if content["complete"] else " (not finished)"))
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN]
    for name in sorted(columns, key="note".__eq__):
        made.add_column(name, justify="left" if name in ("case", "note") else "right")
    for row in rows:
        made.add_row(*(_cell(row.get(name)) for name in sorted(columns, key="note".__eq__)))
    return made


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _packed_commit() -> str | None:
    """Return the commit that `make gpu-pack` noted; a machine without the repository's history has no other."""
    file = PACKED / "commit"
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _driver() -> str | None:
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None

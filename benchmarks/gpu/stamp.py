"""Write what the stage `kernels` found into kernels/tuned.json: python -m benchmarks.gpu.stamp [FOLDER ...]

A configuration that was right gets the stamp `hardware`, from which on it is used on that GPU with that Triton; one that was wrong
loses it. Among those of one kernel, architecture, dtype and shape the fastest comes first. Rehearsals are never stamped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.sheet import read
from benchmarks.measure import HERE, console
from zoo.files import replacing
from zoo.kernels import tuning


def stamp(folder: Path, file: Path = tuning.TABLE) -> int:
    """Stamp the rows of `file` with the results in `folder`. Returns the number of rows that were checked."""
    content = read(folder / "kernels.json")
    if content is None or content["dry"]:
        return 0
    found = {row["case"]: row for row in content["rows"]}
    table: list[tuning.Row] = json.loads(file.read_text(encoding="utf-8"))
    checked = [row for row in table if (result := found.get(tuning.row_name(row))) is not None and "right" in result]
    for row in checked:
        name = tuning.row_name(row)
        time = found.get(f"time of {name}", {}).get("ours ms")
        about = {"device": content["device"], "triton": content["versions"]["triton"], "error": found[name]["error"]}
        row["hardware"] = about | {"ms": time} if found[name]["right"] else None
    lines = ",\n".join(json.dumps(row) for row in fastest_first(table))
    with replacing(file) as new:
        new.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return len(checked)


def group(row: tuning.Row) -> tuple[Any, ...]:
    """Return what the configurations among which one is chosen have in common: kernel, architecture, dtype and shape."""
    return row["kernel"], row["arch"], row["dtype"], tuple(sorted(row["shape"].items()))


def fastest_first(table: list[tuning.Row]) -> list[tuning.Row]:
    """Return the rows, those of one group by time, without moving the groups."""

    def time(row: tuning.Row) -> float:
        measured = (row["hardware"] or {}).get("ms")
        return measured if isinstance(measured, float) else float("inf")

    groups: dict[tuple[Any, ...], list[tuning.Row]] = {}
    for row in table:
        groups.setdefault(group(row), []).append(row)
    ordered = {key: iter(sorted(rows, key=time)) for key, rows in groups.items()}
    return [next(ordered[group(row)]) for row in table]


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted((HERE / "results" / "gpu").glob("*/")):
        console.print(f"{folder}: {stamp(folder)} configurations stamped")

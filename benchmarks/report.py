"""Fill the tables of docs/performance.md with the latest rows of benchmarks/results/.

    python -m benchmarks.report

Tables are between `<!-- benchmark -->` and `<!-- end -->`, and `<!-- summary -->` is a digest of those of prompts and tokens; the rest
of the page is written by hand.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks.measure import HEADINGS, HERE, LIMIT, OURS, cells
from zoo.files import replacing

PAGE = HERE.parent / "docs" / "performance.md"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def latest(benchmark: str) -> list[dict[str, Any]]:
    """Return the rows of the latest run of a benchmark."""
    file = HERE / "results" / f"{benchmark}.jsonl"
    if not file.exists():
        return []
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["case"], *row["ratios"]] = row
    stamp = _stamp(row)
    return [row for row in rows.values() if _stamp(row) == stamp]


def _stamp(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["device"], row["commit"], row["date"], row["load"]


def table(benchmark: str) -> str:
    """Return the table of the latest run as Markdown."""
    rows = latest(benchmark)
    if not rows:
        return "Not measured.\n\n"
    row = rows[0]
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(line) + " |" for one in rows for line in cells(one)]
    facts = {"threads": row["threads"], "load at the end": row["load"], **row["versions"], "commit": row["commit"]}
    where = ", ".join([row["device"], *(f"{name} {value}" for name, value in facts.items() if value is not None), row["date"]]) + "."
    return "\n".join([*lines, "", where, "", ""])


def summary() -> str:
    """Return the rows of prompts and tokens that have a peer: our time in units of the best peer's and of the limit's, as Markdown."""
    lines = ["| case | ours | best peer | beside the best peer | times the limit |", "|---|---:|---|---:|---:|"]
    closest: dict[str, tuple[float, str, dict[str, Any]]] = {}
    for row in latest("prefill") + latest("decode"):
        for peer, (_, ratio, _) in row["ratios"].items():
            if peer != LIMIT and ratio < closest.get(row["case"], (math.inf,))[0]:
                closest[row["case"]] = ratio, peer, row
    for case, (ratio, peer, row) in closest.items():
        ours = f"{row['times'][row.get('ours', OURS)][1]:.4g} {row['unit']}"
        limit = f"{1 / row['ratios'][LIMIT][1]:.2f}" if LIMIT in row["ratios"] else ""
        lines.append(f"| {case} | {ours} | {peer} | {1 / ratio:.2f} | {limit} |")
    return "\n".join([*lines, "", ""])


def _made(name: str) -> str:
    return summary() if name == "summary" else table(name)


def write(page: Path = PAGE) -> None:
    text = PLACE.sub(lambda match: match[1] + _made(match[2]) + match[3], page.read_text(encoding="utf-8"))
    with replacing(page) as scratch:
        scratch.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()

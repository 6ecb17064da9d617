"""Profile: the twenty most expensive operators of reading a prompt, of a predicted token and of a sleep.

    python -m benchmarks.hotspots [NAME of benchmarks.peers.SIZES]

Replaces results/hotspots.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.decode import ours
from benchmarks.measure import HERE, machine
from benchmarks.peers import WORDS, pair
from zoo.files import replacing

TOP = 20


def table(work: Callable[[], object]) -> str:
    """Return a Markdown table: operator, share of the time, milliseconds, calls."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    lines = ["| operator | share | ms | calls |", "|---|---:|---:|---:|"]
    for row in rows[:TOP]:
        lines.append(f"| `{row.key}` | {row.self_cpu_time_total / total:.1%} | {row.self_cpu_time_total / 1000:.2f} | {row.count} |")
    return "\n".join(lines)


@torch.no_grad()
def main(name: str = "GDN + attention 50M") -> None:
    model, _ = pair(name)
    ids = torch.randint(WORDS, (1, 512), generator=torch.Generator().manual_seed(0))
    parts = {
        "A prompt of 512 tokens": partial(model, ids),
        "16 tokens of one stream": ours(model, ids[:, :128]),
        "16 tokens of 16 streams": ours(model, ids[:, :128].repeat(16, 1)),
        "A sleep of 4 passes over 512 tokens": partial(model.consolidate, ids, loops=4),
    }
    where = machine()
    text = f"# {name}\n\n{where['device']}, {where['threads']} threads, torch {where['versions']['torch']}, "
    text += f"commit {where['commit']}, {where['date']}\n"
    for title, work in parts.items():
        text += f"\n## {title}\n\n{table(work)}\n"
    print(text)
    with replacing(HERE / "results" / "hotspots.md") as file:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

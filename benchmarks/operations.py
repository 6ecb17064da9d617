"""Operator counts of a predicted token and of a sleep, which do not depend on the load of the machine.

    python -m benchmarks.operations [--write]

tests/test_operations.py fails if a count differs by more than 5 % from results/operations.json. `--write` replaces that file.
"""

from __future__ import annotations

import json
from collections import Counter

import click
import torch
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from benchmarks.measure import HERE, console
from zoo.files import replacing

COMMITTED = HERE / "results" / "operations.json"
TINY = {"d_model": 32, "d_ff": 64, "vocab_size": 16}
MIXERS = {
    "attn": {"heads": 2},
    "swa": {"heads": 2, "window": 8},
    "gdn": {"heads": 2},
    "jet": {"heads": 2},
    "mamba": {},
    "mamba2": {"head_dim": 16},
}
WINDOW = 24


class Counting(TorchDispatchMode):
    """Count the operators that run in this context, in `seen`. Views are free and not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count() -> dict[str, dict[str, int]]:
    """Count the operators of one predicted token and of one sleep of four passes, for four layers of each kind of mixer."""
    counts = {}
    for kind, options in MIXERS.items():
        layers = f"({kind} gdn)*2" if kind in ("attn", "swa") else f"{kind}*4"
        blocks = {kind: options} | ({"gdn": MIXERS["gdn"]} if "gdn" in layers else {})
        model = zoo.create("gdn4-sleep4", layers=layers, blocks=blocks, window=WINDOW, **TINY)
        ids = torch.zeros(1, WINDOW, dtype=torch.long)
        state = model(ids[:, : WINDOW // 2]).state
        model(ids[:, :1], state)  # the first call with a state also learns the form of the model's states
        with Counting() as token:
            model(ids[:, :1], state)
        with Counting() as sleep:
            model.consolidate(ids)
        counts[layers] = {"token": token.seen.total(), "sleep": sleep.seen.total()}
    return counts


@click.command()
@click.option("--write", is_flag=True, help="Replace results/operations.json.")
def main(write: bool) -> None:
    table = Table("layers", "operators per token", "committed", "per sleep of 4 passes", "committed")
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    counts = count()
    for layers, now in counts.items():
        was = committed.get(layers, {})
        table.add_row(layers, str(now["token"]), str(was.get("token", "")), str(now["sleep"]), str(was.get("sleep", "")))
    console.print(table)
    if write:
        with replacing(COMMITTED) as file:
            file.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

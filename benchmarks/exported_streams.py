"""A token of each of several streams at different positions, from one call of the exported graph as in a pool.

    python -m benchmarks.exported_streams

Compared with one call per stream, and with a pool's buffers in PyTorch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.decode import PROMPT, TOKENS
from benchmarks.genai import FIELDS
from benchmarks.measure import compare, record
from zoo.export.bundle import export
from zoo.export.plan import Plan
from zoo.export.runtime import ExportedModel
from zoo.sessions.slots import Places, Slots
from zoo.state import State

STREAMS = (4, 16)
STORED: dict[str, dict[str, Any]] = {"float32": {}, "8 bits": {"weights": "int8"}}


def together(slots: Places[int], states: list[State], first: Tensor) -> Callable[[], Tensor]:
    """Return a function that generates the next TOKENS greedy tokens of every stream, [n, TOKENS], a token of all at a time."""
    for n, state in enumerate(states):
        slots.put(n, state)
    ids = first

    def work() -> Tensor:
        nonlocal ids
        made = []
        for _ in range(TOKENS):
            ids = slots.read(range(len(states)), ids).argmax(-1)
            made.append(ids)
        return torch.cat(made, dim=1)

    return work


def apart(model: ExportedModel, states: list[State], first: Tensor) -> Callable[[], Tensor]:
    """Return the same function, with a call per stream."""
    alone = [together(model.slots(1), [state], ids[None]) for state, ids in zip(states, first, strict=True)]
    return lambda: torch.cat([work() for work in alone])


@torch.no_grad()
def main() -> None:
    rows = []
    model = zoo.create("gdn4-sleep4-slide512", **FIELDS).requires_grad_(False)
    torch.set_float32_matmul_precision(zoo.matmul_precision())
    zoo.arrange_weights(model)
    for stored, fields in STORED.items():
        with tempfile.TemporaryDirectory() as scratch:
            export(model, Path(scratch) / "bundle", plan=Plan(**fields), verified=False)
            exported = ExportedModel(Path(scratch) / "bundle")
            for streams in STREAMS:
                ids = torch.randint(FIELDS["vocab_size"], (streams, PROMPT), generator=torch.Generator().manual_seed(0))
                states = [model(row[None, : PROMPT - n]).state for n, row in enumerate(ids)]
                ringed, first = [exported.ringed(state) for state in states], ids[:, :1]
                contenders = {
                    "ours": together(exported.slots(streams), ringed, first),
                    "one call per stream": apart(exported, ringed, first),
                    "PyTorch": together(Slots(model, streams, FIELDS["window"]), states, first),
                }
                rows.append(compare(f"GDN + attention 50M, {stored}, {streams} streams", contenders, rounds=5, per=TOKENS, target=1))
    record("exported_streams", rows)


if __name__ == "__main__":
    main()

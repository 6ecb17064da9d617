"""A predicted token: eager, as a CUDA graph, and in transformers, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.gpu.denominators import limit
from benchmarks.gpu.graphs import FORM
from benchmarks.gpu.models import create, greedy, peer, tokens
from benchmarks.gpu.sheet import Case, Row, beside_limit, ours_first, timed
from zoo.sessions.slots import Slots

TOOLS = ("transformers", "fla", "causal_conv1d", "mamba_ssm")
TOKENS = 16


def cases(dry: bool, folder: Path) -> list[Case]:
    found = []
    for name in ("hybrid", "mamba2"):
        made = cache(partial(create, name, dry))
        theirs = cache(lambda made=made: peer(made()))
        for batch in (1, 2) if dry else (1, 8, 16):
            found.append((f"{name}, batch {batch}", partial(measure, made, theirs, batch, 16 if dry else 128, folder)))
    return ours_first(found)


@torch.no_grad()
def measure(made: Callable[[], zoo.Model], theirs: Callable[[], Any], batch: int, prompt: int, folder: Path, *, peers: bool) -> Row:
    model = made()
    ids = tokens(model, batch, prompt)
    contenders: dict[str, Callable[[], Any]] = {"graph": ours(model, ids, graph=True), "eager": ours(model, ids, graph=False)}
    later: list[Callable[[], Tensor]] = []

    def transformers() -> Tensor:
        if not later:  # the model and its prompt are made within the call, so that a failure is a cell
            later.append(greedy(theirs(), ids, TOKENS))
        return later[0]()

    row = timed(contenders | ({"transformers": transformers} if peers else {}), per=TOKENS)
    weights = sum(p.nbytes for p in model.parameters())
    fast = sum(s.nbytes for s in model.init_state(batch).fast if s is not None)
    kept = batch * prompt * zoo.describe(model).kv_bytes_per_token
    row = beside_limit(row, "graph ms", limit(folder, weights + 2 * fast + kept, batch * zoo.describe(model).flops_per_token))
    return row | {"MB read": (weights + 2 * fast + kept) / 1e6, "note": FORM}


def ours(model: zoo.Model, ids: Tensor, *, graph: bool) -> Callable[[], None]:
    """Return a function that predicts the next TOKENS tokens of each stream."""
    names = list(range(len(ids)))
    slots: Slots[int] = Slots(model, len(ids), 2 * ids.shape[1])
    for i in names:
        slots.put(i, model(ids[i : i + 1]).state)

    def generate() -> None:
        token = ids[:, -1:]
        for _ in range(TOKENS):
            if not graph:
                slots.ids.copy_(token)
            logits = slots.read(names, token) if graph else slots.token(len(names), slots.context)
            token = logits[:, -1].argmax(-1, keepdim=True)

    return generate

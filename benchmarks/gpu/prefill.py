"""Reading a prompt, up to the logits of its last token, beside transformers with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.gpu.denominators import limit
from benchmarks.gpu.models import create, peer, tokens
from benchmarks.gpu.sheet import Case, Row, beside_limit, ours_first, timed
from zoo.costs import training_flops

TOOLS = ("transformers", "fla", "causal_conv1d", "mamba_ssm")


def cases(dry: bool, folder: Path) -> list[Case]:
    found = []
    for name in ("hybrid", "mamba2"):
        made = cache(partial(create, name, dry))
        theirs = cache(lambda made=made: peer(made()))
        for length in (16, 64) if dry else (512, 2048, 8192):
            found.append((f"{name}, 1 x {length}", partial(measure, made, theirs, length, folder)))
    return ours_first(found)


@torch.no_grad()
def measure(made: Callable[[], zoo.Model], theirs: Callable[[], Any], length: int, folder: Path, *, peers: bool) -> Row:
    model = made()
    ids = tokens(model, 1, length)

    def ours() -> Tensor:
        return model(ids, logits_to_keep=1).logits

    def transformers() -> Tensor:
        return theirs()(ids, logits_to_keep=1).logits

    contenders = {"ours": ours} | ({"transformers": transformers} if peers else {})
    row = timed(contenders, tolerance=0.25)  # bfloat16, random weights
    weights = sum(p.nbytes for p in model.parameters())
    return beside_limit(row, "ours ms", limit(folder, weights, flops(model, length)))


def flops(model: zoo.Model, length: int) -> int:
    """Return the operations of one wake pass over `length` tokens, with logits of the last."""
    mask = torch.zeros(1, length + 1, dtype=torch.bool)
    mask[0, -1] = True
    return training_flops(model, mask) // 3

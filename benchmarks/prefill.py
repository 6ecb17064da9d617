"""Time to read a prompt, compared with transformers on the same weights.

python -m benchmarks.prefill [--all]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

import zoo
from benchmarks.measure import compare, record
from benchmarks.peers import SMALL, WORDS, pairs

ALONE = {"Mamba + sliding attention 421M": "samba421m", "Jet + attention 50M": "depo10"}  # not in transformers


def read(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def first_token(model: zoo.Model, ids: Tensor) -> Tensor:
    return next(zoo.Session(model, len(ids)).generate(ids, 1))


def their_first_token(model: Any, ids: Tensor) -> Tensor:
    return model(ids, logits_to_keep=1).logits[:, -1].argmax(-1)


@click.command()
@click.option("--all", "large", is_flag=True, help="Include the models of 370M and more.")
@torch.no_grad()
def main(large: bool) -> None:
    rows = []
    torch.set_float32_matmul_precision(zoo.matmul_precision())
    for name, ours, theirs in pairs(large):
        for batch, length in [(1, 512), (4, 512), (1, 2048)] if name in SMALL else [(1, 512)]:
            ids = torch.randint(WORDS, (batch, length), generator=torch.Generator().manual_seed(0))
            contenders = {"ours": partial(read, ours, ids), "transformers": partial(read, theirs, ids)}
            rows.append(compare(f"{name}, {batch} x {length}", contenders, rounds=3, target=1.3, tolerance=1e-3))
            contenders = {"ours": partial(first_token, ours, ids), "transformers": partial(their_first_token, theirs, ids)}
            rows.append(compare(f"{name}, {batch} x {length}, first token", contenders, rounds=3, target=1.3))
    for name, config in ALONE.items():
        if large or name.endswith("50M"):
            model = zoo.create(config, evict="none")
            ids = torch.randint(model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
            rows.append(compare(f"{name}, 1 x 512", {"ours": partial(read, model, ids)}, rounds=3))
    record("prefill", rows)


if __name__ == "__main__":
    main()

"""Cost of a predicted token: a session compared with transformers on the same weights, and with the lower bound.

    python -m benchmarks.decode [--all]

"weights alone" is the lower bound: only the products of the model's matrices with one row per stream. As in `zoo chat`, our weights
are laid out as `zoo.arrange_weights` finds; all contenders run under the precision that `zoo.matmul_precision` finds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from benchmarks.measure import compare, record
from benchmarks.peers import WORDS, pairs

PROMPT, TOKENS = 128, 16


def ours(model: zoo.Model, prompt: Tensor, tokens: int = TOKENS) -> Callable[[], Tensor]:
    """Return a function that generates the next greedy tokens, [B, `tokens`], of the stream after `prompt`."""
    session = zoo.Session(model, len(prompt))
    session.feed(prompt)
    return lambda: torch.stack(list(session.generate(None, tokens)), dim=1)


def transformers(model: Any, prompt: Tensor, tokens: int = TOKENS) -> Callable[[], Tensor]:
    """Return the same for a transformers model."""
    out = model(prompt, use_cache=True)

    def generate() -> Tensor:
        nonlocal out
        generated = []
        for _ in range(tokens):
            generated.append(out.logits[:, -1].argmax(-1))
            cache = {name: getattr(out, name) for name in ("past_key_values", "cache_params") if hasattr(out, name)}
            out = model(generated[-1][:, None], **cache, use_cache=True)
        return torch.stack(generated, dim=1)

    return generate


def weights_alone(model: zoo.Model, batch: int) -> None:
    for _ in range(TOKENS):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                F.linear(_rows(batch, module.in_features), module.weight)
        if model.config.tie_embeddings:
            F.linear(_rows(batch, model.config.d_model), model.embed.weight)


def _rows(batch: int, width: int) -> Tensor:
    return torch.ones(batch, width)


@click.command()
@click.option("--all", "large", is_flag=True, help="Include the models of 370M and more.")
@torch.no_grad()
def main(large: bool) -> None:
    rows = []
    torch.set_float32_matmul_precision(zoo.matmul_precision())
    for name, model, theirs in pairs(large):
        zoo.arrange_weights(model)
        for batch in (1, 16):
            prompt = torch.randint(WORDS, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
            contenders = {
                "ours": ours(model, prompt),
                "transformers": transformers(theirs, prompt),
                "weights alone": partial(weights_alone, model, batch),
            }
            rows.append(compare(f"{name}, batch {batch}", contenders, rounds=5, per=TOKENS, target=2))
    record("decode", rows)


if __name__ == "__main__":
    main()

"""Time to read a prompt, compared with transformers and llama.cpp on the same weights, and with the lower bound.

    python -m benchmarks.prefill [--all]

"limit" multiplies as many numbers as the blocks' matrices do, in one large product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import zoo
from benchmarks import stored
from benchmarks.gguf_files import takes
from benchmarks.llama import Llama
from benchmarks.measure import LIMIT, compare, record
from benchmarks.peers import SMALL, WORDS, pairs
from zoo.export.runtime import ExportedModel

LENGTH = 2304
LENGTHS = (128, 512, 2048)
TARGETS = {"Mamba-2 50M": 1 / 0.7, "attention 50M": 1 / 0.8}
ALONE = {"Mamba + sliding attention 421M": "samba421m", "Jet + attention 50M": "depo10"}  # not in transformers


def read(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def first_token(model: Any, ids: Tensor) -> Tensor:
    return next(zoo.Session(model, len(ids)).generate(ids, 1))


def their_first_token(model: Any, ids: Tensor) -> Tensor:
    return model(ids, logits_to_keep=1).logits[:, -1].argmax(-1)


def llama_first_token(model: Llama | None, ids: Tensor) -> Callable[[], Tensor] | None:
    """Return the function that llama.cpp is timed by; None where it is not installed."""

    def work() -> Tensor:
        assert model is not None
        model.clear()
        return torch.from_numpy(model.read(ids)).argmax(-1)

    return work if model is not None else None


def products(model: zoo.Model, tokens: int) -> Callable[[], object]:
    """Return a function that multiplies `tokens` rows with a matrix of as many weights as those of the blocks' linear layers."""
    weights = sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, nn.Linear))
    rows, matrix = torch.ones(tokens, 2048), torch.ones(2048, weights // 2048)
    return lambda: rows @ matrix


def beside_llama(name: str, model: zoo.Model) -> list[dict[str, Any]]:
    """Time the first token after prompts of several lengths, in PyTorch and in an exported graph."""
    rows, pytorch = [], TARGETS.get(name)
    with tempfile.TemporaryDirectory() as scratch:
        stored.write(model, Path(scratch), ["F32"], LENGTH)
        zoo.arrange_weights(model)
        for threads, length in (*((2, length) for length in LENGTHS), (1, 512)):
            torch.set_num_threads(threads)
            ids = torch.randint(WORDS, (1, length), generator=torch.Generator().manual_seed(0))
            limit = products(model, length)
            forms = {"": (model, pytorch), ", exported": (ExportedModel(Path(scratch) / "F32"), 1 / 1.2)}  # of that many threads
            peer = llama_first_token(stored.in_llama(Path(scratch), "F32", 1, LENGTH), ids)
            for form, (ours, target) in forms.items():
                case = f"{name}{form}, 1 x {length}, first token" + ", 1 thread" * (threads == 1)
                contenders = {"ours": partial(first_token, ours, ids), "llama.cpp": peer, LIMIT: limit}
                rows.append(compare(case, contenders, rounds=9 if length == min(LENGTHS) else 3, target=target))
    return rows


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
            contenders[LIMIT] = products(ours, batch * length)
            rows.append(compare(f"{name}, {batch} x {length}, first token", contenders, rounds=3, target=1.3))
        if takes(ours) and name in SMALL:
            rows += beside_llama(name, ours)
            torch.set_num_threads(2)
    for name, config in ALONE.items():
        if large or name.endswith("50M"):
            model = zoo.create(config, evict="none")
            ids = torch.randint(model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
            rows.append(compare(f"{name}, 1 x 512", {"ours": partial(read, model, ids)}, rounds=3))
    record("prefill", rows)


if __name__ == "__main__":
    main()

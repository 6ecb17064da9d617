"""Cost of a token, of a piece of a prompt and of a sleep in exported graphs whose linear layers have 8 or 4 bits, compared with float32.

python -m benchmarks.integers [--threads N]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor

import zoo
from benchmarks.measure import compare, record
from zoo.export.bundle import export
from zoo.export.plan import Plan
from zoo.export.runtime import ExportedModel

WORDS, TOKENS, PIECE = 32000, 16, 128
DIALECTS: tuple[Literal["ort", "portable"], ...] = ("ort", "portable")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba-2 50M": ("mamba2-130m", {"layers": "mamba2*20"}),
    "attention 50M": ("gdn4", {"layers": "attn*10", "d_ff": 1536, "blocks": {"attn": {"heads": 8, "kv_heads": 4}}}),
    "GDN + attention 50M": ("gdn4", {"layers": "(gdn*3 attn)*2", "d_ff": 1536, "blocks": {"gdn": {"heads": 4}}}),
}


def opened(model: zoo.Model, plan: Plan) -> dict[str, ExportedModel]:
    """Export a model with weights of 4, 8 and 32 bits, and open the bundles."""
    graphs = {}
    with tempfile.TemporaryDirectory() as scratch:
        for weights in ("int4", "int8", None):
            folder = Path(scratch) / str(weights)
            export(model, folder, plan=plan.model_copy(update={"weights": weights}), verified=False)
            graphs[weights or "float32"] = ExportedModel(folder)
    return graphs


def sleeps(model: ExportedModel, ids: Tensor) -> Callable[[], Tensor]:
    """Return a function that sleeps on ids [1, T], a whole window, and returns the fast weights of one block."""
    start = model.init_state()
    return lambda: next(fast for fast in model.consolidate(ids, start).fast if fast is not None)


def reads(model: ExportedModel, ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    """Return a function that reads ids [1, T], `tokens` per call, and returns the last logits."""
    start = model.init_state()

    def work() -> Tensor:
        state = start
        for piece in ids.split(tokens, dim=1):
            logits, state = model(piece, state, logits_to_keep=1)
        return logits

    return work


@click.command()
@click.option("--threads", default=2, show_default=True)
@torch.no_grad()
def main(threads: int) -> None:
    torch.set_num_threads(threads)
    ids = torch.randint(WORDS, (1, PIECE), generator=torch.Generator().manual_seed(0))
    one, many, asleep = [], [], []
    for case, (base, fields) in MODELS.items():
        model = zoo.create(base, vocab_size=WORDS, d_model=512, tie_embeddings=True, **fields)
        for dialect in DIALECTS:
            graphs = opened(model, Plan(dialect=dialect, max_length=2 * PIECE, prefill=PIECE))
            token = {name: reads(graph, ids[:, :TOKENS], 1) for name, graph in graphs.items()}
            piece = {name: reads(graph, ids, PIECE) for name, graph in graphs.items()}
            one.append(compare(f"{case}, {dialect}", token, ours="int4", per=TOKENS, target=1.6))
            many.append(compare(f"{case}, {dialect}", piece, ours="int4", target=1))
    model = zoo.create(f"gdn4-sleep4-hard{PIECE}", vocab_size=WORDS, d_model=512, tie_embeddings=True, **MODELS["GDN + attention 50M"][1])
    for dialect in DIALECTS:
        graphs = opened(model, Plan(dialect=dialect))
        works = {name: sleeps(graph, ids) for name, graph in graphs.items()}
        asleep.append(compare(f"GDN + attention 50M, N = 4, {dialect}", works, ours="int4", target=1))
    record("exported_integers", one)
    record("exported_integers_prefill", many)
    record("exported_integers_sleep", asleep)


if __name__ == "__main__":
    main()

"""Cost of a token and of a sleep in exported graphs on a CPU, compared with PyTorch on the same weights and tokens.

    python -m benchmarks.export [--dialect ort] [--threads N]

A sleep is exported in three forms; the first, a Loop, is the default of `zoo-export`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import zoo
from benchmarks.measure import OURS, compare, record
from zoo.export.bundle import export
from zoo.export.plan import Plan
from zoo.export.runtime import ExportedModel

FORMS = {"loop": OURS, "unroll": "unrolled", "per-pass": "per-pass"}
CASES: dict[str, dict[str, Any]] = {
    "gdn4-sleep4": {},
    "gdn4-sleep4, windows of 256": {"window": 256, "vocab_size": 1024},
    "jets, windows of 256": {
        "layers": "jet*2 attn jet swa",
        "span": (1, 3),
        "window": 256,
        "vocab_size": 1024,
        "blocks": {"jet": {"heads": 4}, "swa": {"window": 128}},
    },
}
TOKENS = 16


def predicts(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Return a function that reads ids [1, T] one at a time, after a sleep."""
    start = model.consolidate(ids, model.init_state(1))

    def work() -> Tensor:
        state = start
        for token in ids.split(1, dim=1):
            logits, state = model(token, state)
        return logits

    return work


def sleeps(consolidate: Callable[..., Any], start: Any, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: next(fast for fast in reversed(consolidate(ids, start).fast) if fast is not None)


@click.command()
@click.option("--dialect", type=click.Choice(["portable", "ort"]), default="portable", show_default=True)
@click.option("--threads", default=1, show_default=True)
@torch.no_grad()
def main(dialect: str, threads: int) -> None:
    torch.set_num_threads(threads)
    awake, asleep = [], []
    for case, fields in CASES.items():
        torch.compiler.reset()  # earlier models count towards the limit on recompilation, after which nothing is compiled
        model = zoo.create("gdn4-sleep4", **fields).requires_grad_(False)
        window = model.config.window or 1
        ids = torch.randint(model.config.vocab_size, (1, window), generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as scratch:
            graphs: dict[str, ExportedModel] = {}
            for form, name in FORMS.items():
                export(model, Path(scratch) / form, plan=Plan(sleep=form, dialect=dialect), verified=False)  # type: ignore[arg-type]
                graphs[name] = ExportedModel(Path(scratch) / form)
        few, title = ids[:, :TOKENS], f"{case}, {dialect}"
        contenders = {OURS: predicts(graphs[OURS], few), "PyTorch": predicts(model, few)}
        contenders["torch.compile"] = predicts(_Compiled(model), few)
        awake.append(compare(title, contenders, per=TOKENS, target=1, tolerance=1e-4))
        contenders = {name: sleeps(graph.consolidate, graph.init_state(1), ids) for name, graph in graphs.items()}
        contenders["PyTorch"] = sleeps(model.consolidate, model.init_state(1), ids)
        contenders["torch.compile"] = sleeps(torch.compile(model.consolidate), model.init_state(1), ids)
        asleep.append(compare(title, contenders, target=1, tolerance=1e-4))
    record("exported_token", awake)
    record("exported_sleep", asleep)


class _Compiled:
    def __init__(self, model: zoo.Model) -> None:
        self.consolidate, self.init_state, self._wake = model.consolidate, model.init_state, torch.compile(model)

    def __call__(self, ids: Tensor, state: Any) -> Any:
        return self._wake(ids, state)


if __name__ == "__main__":
    main()

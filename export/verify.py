"""Exported graphs against the PyTorch model, over a stream that sleeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from zoo.export.ring import PAST, RingKV, pack
from zoo.export.runtime import ExportedModel
from zoo.kernels.registry import ZooError
from zoo.model import Model, State

TOLERANCE = 1e-3
WINDOWS = 4
BATCH = 2

CHUNK, TOKEN, SLEEP = "awake, chunk by chunk", "awake, token by token", "after sleep"


@dataclass(frozen=True)
class Difference:
    """Absolute differences over everything of one kind, in units of max(1, the reference's size).

    The size is the deviation of logits, and the largest value of a state.
    """

    maximum: float
    mean: float


@dataclass(frozen=True)
class Parity:
    """How far the graphs are from PyTorch, by (moment, kind of tensor), and how often they choose the same next token."""

    differences: dict[tuple[str, str], Difference]
    agreement: float
    tokens: int

    def table(self) -> Table:
        table = Table("moment", "tensor", "largest difference", "mean", title="onnxruntime against PyTorch")
        for (moment, kind), difference in self.differences.items():
            table.add_row(moment, kind, f"{difference.maximum:.1e}", f"{difference.mean:.1e}")
        table.caption = f"{WINDOWS} windows with sleeps between, {BATCH} streams; same greedy token {self.agreement:.2%} of {self.tokens}"
        return table


@torch.no_grad()
def verify(model: Model, exported: ExportedModel) -> Parity:
    """Run both over the same stream of windows, the last one cut short, with a sleep after each.

    PyTorch answers twice, in whole chunks and token by token.

    Raises:
        ZooError: they are further apart than `TOLERANCE`.
    """
    window = exported.config.window
    assert window is not None
    ids = torch.randint(model.config.vocab_size, (BATCH, WINDOWS * window - window // 2), generator=torch.Generator().manual_seed(0))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    agreed: list[Tensor] = []
    torch_state, onnx_state = model.init_state(BATCH), exported.init_state(BATCH)
    for chunk in ids.split(window, dim=1):
        logits, after = exported(chunk, onnx_state)
        stepwise, stepped = [], torch_state
        for token in chunk.split(1, dim=1):
            step, stepped = model(token, stepped)
            stepwise.append(step)
        whole, waked = model(chunk, torch_state)
        for moment, wanted, state in ((CHUNK, whole, waked), (TOKEN, torch.cat(stepwise, dim=1), stepped)):
            found.setdefault((moment, "logits"), []).append(_difference(logits, wanted, wanted.std()))
            _compare_states(found, moment, after, state)
            agreed.append(logits.argmax(-1) == wanted.argmax(-1))
        torch_state, onnx_state = model.consolidate(chunk, torch_state), exported.consolidate(chunk, onnx_state)
        _compare_states(found, SLEEP, onnx_state, torch_state)

    together = {
        key: Difference(max(maximum for maximum, _ in pairs), sum(mean for _, mean in pairs) / len(pairs)) for key, pairs in found.items()
    }
    for (moment, kind), difference in together.items():
        if not difference.maximum <= TOLERANCE:
            raise ZooError(
                f"{model.config.name}: {kind}, {moment}: the graph is {difference.maximum:.1e} from PyTorch, allowed: {TOLERANCE:.0e}"
            )
    same = torch.cat([part.flatten() for part in agreed])
    return Parity(together, same.float().mean().item(), ids.numel())


def _compare_states(found: dict[tuple[str, str], list[tuple[float, float]]], moment: str, state: State, wanted: State) -> None:
    ordered = tuple(
        cache.ordered(int(state.position), reference.key.shape[2]) if isinstance(cache, RingKV) else cache
        for cache, reference in zip(state.window, wanted.window, strict=True)
    )
    for name, tensor in pack(state._replace(window=ordered), PAST).items():
        reference = pack(wanted, PAST)[name]
        if reference.numel():  # an emptied cache has nothing to compare
            found.setdefault((moment, name.rsplit(".", 1)[1]), []).append(_difference(tensor, reference, reference.abs().max()))


def _difference(a: Tensor, wanted: Tensor, size: Tensor) -> tuple[float, float]:
    apart = (a - wanted).abs() / size.clamp(min=1)
    return apart.max().item(), apart.mean().item()

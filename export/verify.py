"""Exported graphs against the PyTorch model, over a stream that sleeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor

from zoo.errors import ZooError
from zoo.export.quantise import rounded
from zoo.export.ring import PAST, pack
from zoo.export.runtime import ExportedModel
from zoo.model import Model
from zoo.state import State

TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
"""By precision of the graphs; PyTorch computes in float32."""
WINDOWS = 4
ALIKE = 2  # the window that says one word over and over, which makes its keys as alike as they can be
BATCH = 2
STEPPED = 64  # tokens of a window that are read one by one: all of a short window, else a few at its start, middle and end

CHUNK, TOKEN, SLEEP, STRESS = "awake, chunk by chunk", "awake, token by token", "after sleep", "after sleep on one word repeated"


@dataclass(frozen=True)
class Difference:
    """Absolute differences over everything under one name, in units of max(1, the reference's size).

    The size is the deviation of logits, and the largest value of a state.
    """

    maximum: float
    mean: float


@dataclass(frozen=True)
class Parity:
    """How far the graphs are from PyTorch, by (moment, name of an output or state), and how often they choose the same next token."""

    differences: dict[tuple[str, str], Difference]
    agreement: float
    tokens: int
    loss: tuple[str, Difference, float] | None = None
    """What the storage of the weights costs: its name, how far the logits are from the model's own, agreement with it."""

    def table(self) -> Table:
        """A row for every moment and kind of tensor: the layer that is furthest apart, and the mean of all."""
        table = Table("moment", "tensor", "largest difference", "of", "mean", title="onnxruntime against PyTorch")
        kinds: dict[tuple[str, str], list[tuple[Difference, str]]] = {}
        for (moment, name), difference in self.differences.items():
            kinds.setdefault((moment, name.rpartition(".")[2]), []).append((difference, name))
        for (moment, kind), found in kinds.items():
            worst, name = max(found, key=lambda pair: pair[0].maximum)
            mean = sum(difference.mean for difference, _ in found) / len(found)
            layer = name.split(".")[1] if "." in name else ""
            table.add_row(moment, kind, f"{worst.maximum:.1e}", f"layer {layer}" if layer else "", f"{mean:.1e}")
        table.caption = f"{BATCH} streams; same greedy token {self.agreement:.2%} of {self.tokens}"
        if self.loss is not None:
            how, difference, agreement = self.loss
            table.caption += (
                f"\nweights in {how} against the model's own, in PyTorch: logits {difference.maximum:.1e} apart at most, "
                f"{difference.mean:.1e} in the mean; same greedy token {agreement:.2%}"
            )
        return table


class _Findings:
    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self.agreed: list[Tensor] = []

    def logits(self, moment: str, logits: Tensor, wanted: Tensor) -> None:
        self._add(moment, "logits", logits, wanted, wanted.std())
        self.agreed.append((logits.argmax(-1) == wanted.argmax(-1)).flatten())

    def states(self, moment: str, state: State, wanted: State) -> None:
        for (name, tensor), reference in zip(pack(state, PAST).items(), pack(wanted, PAST).values(), strict=True):
            if reference.numel():  # an emptied cache has nothing to compare
                self._add(moment, name, tensor, reference, reference.abs().max())

    def _add(self, moment: str, name: str, tensor: Tensor, wanted: Tensor, size: Tensor) -> None:
        apart = (tensor.to(wanted.dtype) - wanted).abs() / size.clamp(min=1)
        self.found.setdefault((moment, name), []).append((apart.max().item(), apart.mean().item()))

    def parity(self) -> Parity:
        together = {key: Difference(max(m for m, _ in pairs), sum(m for _, m in pairs) / len(pairs)) for key, pairs in self.found.items()}
        same = torch.cat(self.agreed)
        return Parity(together, same.float().mean().item(), same.numel())


@torch.no_grad()
def verify(model: Model, exported: ExportedModel) -> Parity:
    """Run both over the same stream of windows, one of a single word repeated, the last one cut short, with a sleep after each.

    Each keeps its own states from sleep to sleep. Within a window PyTorch reads whole chunks and single tokens; the graphs
    read them as they are made to, and where a window is long, tokens in its middle from the state that PyTorch has there.

    Raises:
        ZooError: they are further apart than `TOLERANCE`.
    """
    stored = exported.bundle.plan.weights
    reference = model if stored is None else rounded(model, stored)
    reference = copy.deepcopy(reference).float() if model.embed.weight.dtype != torch.float32 else reference
    ids, length = stream(model, exported.bundle.window), exported.bundle.window
    found = _Findings()
    wanted, state = reference.init_state(BATCH), exported.init_state(BATCH)
    for number, chunk in enumerate(ids.split(length, dim=1)):
        _awake(found, reference, exported, chunk, wanted, state)
        if model.config.window is not None:
            wanted, state = reference.consolidate(chunk, wanted), exported.consolidate(chunk, state)
            found.states(STRESS if number == ALIKE else SLEEP, exported.plain(state), wanted)
    parity = found.parity()
    if stored is not None:
        parity = replace(parity, loss=(stored, *_loss(copy.deepcopy(model).float(), reference, ids[:, :length])))
    allowed = TOLERANCE[exported.bundle.precision]
    for (moment, name), difference in parity.differences.items():
        if not difference.maximum <= allowed:
            raise ZooError(
                f"{model.config.name}: {name}, {moment}: the graph is {difference.maximum:.1e} from PyTorch, allowed: {allowed:.0e}"
            )
    return parity


def stream(model: Model, window: int) -> Tensor:
    """What `verify` reads: [2, 3.5 windows], or one window of a model that does not sleep."""
    sleeps = model.config.window is not None
    ids = torch.randint(model.config.vocab_size, (BATCH, (WINDOWS if sleeps else 1) * window), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : ids.shape[1] - window // 2] if sleeps else ids
    ids[:, ALIKE * window : (ALIKE + 1) * window] = ids[:, :1]
    return ids


def _loss(model: Model, rounded: Model, ids: Tensor) -> tuple[Difference, float]:
    wanted, logits = model(ids).logits, rounded(ids).logits
    apart = (logits - wanted).abs() / wanted.std().clamp(min=1)
    return Difference(apart.max().item(), apart.mean().item()), (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item()


def _awake(found: _Findings, reference: Model, exported: ExportedModel, chunk: Tensor, wanted: State, state: State) -> None:
    T = chunk.shape[1]
    whole, after = reference(chunk, wanted)
    if T <= STEPPED or exported.bundle.plan.prefill:
        logits, read = exported(chunk, state)
        found.logits(CHUNK, logits, whole)
        found.states(CHUNK, exported.plain(read), after)
    few = STEPPED // 4
    for start, end in [(0, T)] if T <= STEPPED else [(0, few), (T // 2, T // 2 + few), (T - few, T)]:
        there = wanted if start == 0 else reference(chunk[:, :start], wanted).state
        mine = state if start == 0 else exported.ringed(_like(there, state))
        for token in chunk[:, start:end].split(1, dim=1):
            want, there = reference(token, there)
            logits, mine = exported(token, mine)
            found.logits(TOKEN, logits, want)
        found.states(TOKEN, exported.plain(mine), there)


def _like(state: State, graph: State) -> State:
    """A float32 state in the precision of the graph's."""
    window = tuple(
        cache if cache is None else cache._make(x.to(own.dtype) for x, own in zip(cache, like, strict=True))
        for cache, like in zip(state.window, graph.window, strict=True)
    )
    return state._replace(window=window)

"""Comparison of exported graphs with the PyTorch model on a stream that sleeps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from zoo.devices import usable_device
from zoo.errors import ZooError
from zoo.export.manifest import SLEEPING
from zoo.export.quantise import rounded
from zoo.export.ring import PAST, PRESENT, pack
from zoo.export.runtime import ExportedModel, providers
from zoo.model import Model
from zoo.state import State

TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
"""Largest allowed difference from PyTorch, by precision of the graphs."""
AMPLIFIED = 10
"""Largest allowed error of the graphs of an ill-conditioned model, in units of the error of PyTorch in float32."""
WINDOWS = 4
REPEATED = 2  # index of the window that repeats one token, which maximizes the correlation of its keys
BATCH = 2
STEPPED = 64  # windows up to this length are read token by token; longer ones only at the start, middle and end

CHUNK, TOKEN, SLEEP, STRESS = "awake, chunk by chunk", "awake, token by token", "after sleep", "after sleep on one repeated token"
ALONE = "sleeping by itself"


@dataclass(frozen=True)
class Difference:
    """Absolute differences of one tensor, in units of max(1, scale).

    The scale is the standard deviation of logits, and the largest absolute value of states.
    """

    maximum: float
    mean: float


@dataclass(frozen=True)
class Loss:
    """Error of the logits of a bundle with integer weights, as it runs, compared with PyTorch and the original weights."""

    stored: str
    """How weights and activations enter the products."""
    divergence: float
    """Mean Kullback-Leibler divergence of the predicted distributions, in nats per token."""
    difference: Difference
    agreement: float
    """Rate at which greedy tokens agree."""

    def __str__(self) -> str:
        return (
            f"{self.stored} vs the original weights: KL divergence {self.divergence:.1e}, logits differ by at most "
            f"{self.difference.maximum:.1e}, {self.difference.mean:.1e} on average; same greedy token {self.agreement:.2%}"
        )


@dataclass(frozen=True)
class Parity:
    """Result of a comparison: differences by (stage, name of an output or state), and the rate at which greedy tokens agree."""

    differences: dict[tuple[str, str], Difference]
    agreement: float
    tokens: int
    reference: str
    """Precision in which PyTorch computed: float32, or float64 for an ill-conditioned model."""
    loss: Loss | None = None
    """Error of integer weights."""

    def outside(self, allowed: float) -> list[tuple[str, str]]:
        """Return the stages and names of the tensors that differ by more than this, or are not finite."""
        return [key for key, difference in self.differences.items() if not difference.maximum <= allowed]

    def table(self) -> Table:
        """Return a table with one row per stage and kind of tensor: the layer with the largest difference, and the mean over layers."""
        table = Table("stage", "tensor", "largest difference", "layer", "mean", title=f"onnxruntime vs PyTorch in {self.reference}")
        kinds: dict[tuple[str, str], list[tuple[Difference, str]]] = {}
        for (stage, name), difference in self.differences.items():
            kinds.setdefault((stage, name.rpartition(".")[2]), []).append((difference, name))
        for (stage, kind), found in kinds.items():
            worst, name = max(found, key=lambda pair: pair[0].maximum)
            mean = sum(difference.mean for difference, _ in found) / len(found)
            layer = name.split(".")[1] if "." in name else ""
            table.add_row(stage, kind, f"{worst.maximum:.1e}", layer, f"{mean:.1e}")
        table.caption = f"{BATCH} streams; same greedy token {self.agreement:.2%} of {self.tokens}"
        table.caption += "" if self.loss is None else f"\n{self.loss}"
        return table


class _Findings:
    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self.agreed: list[Tensor] = []

    def logits(self, stage: str, logits: Tensor, wanted: Tensor) -> None:
        self._add(stage, "logits", logits, wanted, wanted.std())
        self.agreed.append((logits.argmax(-1).to(wanted.device) == wanted.argmax(-1)).flatten())

    def states(self, stage: str, state: State, wanted: State) -> None:
        for (name, tensor), reference in zip(pack(state, PAST).items(), pack(wanted, PAST).values(), strict=True):
            if reference.numel():  # skip emptied caches
                self._add(stage, name, tensor, reference, reference.abs().max())

    def _add(self, stage: str, name: str, tensor: Tensor, wanted: Tensor, size: Tensor) -> None:
        apart = (tensor.to(wanted) - wanted).abs() / size.clamp(min=1)
        self.found.setdefault((stage, name), []).append((apart.max().item(), apart.mean().item()))

    def parity(self, reference: str) -> Parity:
        # unlike Python's, these do not lose a NaN
        together = {key: Difference(float(np.max(pairs, axis=0)[0]), float(np.mean(pairs, axis=0)[1])) for key, pairs in self.found.items()}
        same = torch.cat(self.agreed)
        return Parity(together, same.float().mean().item(), same.numel(), reference)


@torch.no_grad()
def verify(model: Model, exported: ExportedModel, device: str | torch.device = "cpu") -> Parity:
    """Run both over the same stream of windows, with a sleep after each; one window repeats a token, the last one is short.

    Each side keeps its own states from sleep to sleep. Both read every window as whole chunks and token by token; in the
    middle of long windows, the graphs start from PyTorch's state. With integer weights, PyTorch has the same rounded weights, and
    the graphs do not round activations; the error of the bundle as it runs is measured separately.
    PyTorch computes in float32. An ill-conditioned model can amplify rounding beyond `TOLERANCE`: if the graphs differ by more,
    PyTorch in float64 decides, and `AMPLIFIED` times the error of PyTorch in float32 is allowed.

    Args:
        device: where PyTorch runs.
    Raises:
        ZooError: they differ by more, or there is no such device.
    """
    device = usable_device(device, meta=False)
    bits = exported.bundle.plan.bits
    reference = model if bits is None else rounded(model, bits)
    exact = exported
    if bits is not None and not exported.bundle.plan.exact_activations:
        exact = ExportedModel(exported.folder, exported.provider, exact_activations=True)
    ids, allowed = stream(model, exported.bundle.window).to(device), TOLERANCE[exported.bundle.precision]
    reference = _converted(reference, device, torch.float32)
    parity = _compare(reference, exact, ids)
    if parity.outside(allowed):
        accurate = _converted(reference, device, torch.float64)
        parity, allowed = _compare(accurate, exact, ids), max(allowed, AMPLIFIED * _rounding(reference, accurate, ids))
    for stage, name in parity.outside(allowed):
        maximum = parity.differences[stage, name].maximum
        raise ZooError(f"{model.config.name}: {name}, {stage}: the graph differs from PyTorch by {maximum:.1e}, allowed: {allowed:.0e}")
    if bits is not None:
        loss = _loss(_converted(model, device, torch.float32), exported, ids)
        parity = replace(parity, loss=loss)
    return parity


def _converted(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """Return the model in this precision on this device: a copy, if it is not there already."""
    weight = model.embed.weight
    return model if (weight.dtype, weight.device) == (dtype, device) else copy.deepcopy(model).to(device, dtype)


def _rounding(model: Model, accurate: Model, ids: Tensor) -> float:
    """Return the error of the model's logits on the stream ids [2, T], in units of max(1, standard deviation)."""
    state, wanted, errors = model.init_state(BATCH), accurate.init_state(BATCH), list[float]()
    for chunk in ids.split(model.config.window or ids.shape[1], dim=1):
        logits, want = model(chunk, state).logits, accurate(chunk, wanted).logits
        errors.append(((logits - want).abs().max() / want.std().clamp(min=1)).item())
        if model.config.window is not None:
            state, wanted = model.consolidate(chunk, state), accurate.consolidate(chunk, wanted)
    return float(np.max(errors))


def _compare(reference: Model, exported: ExportedModel, ids: Tensor) -> Parity:
    """Compare the graphs with PyTorch on the stream ids [2, T]."""
    found = _Findings()
    wanted, state, answers = reference.init_state(BATCH), exported.init_state(BATCH), []
    for number, chunk in enumerate(ids.split(exported.bundle.window, dim=1)):
        answers.append(_awake(found, reference, exported, chunk, wanted, state)[:1])
        if reference.config.window is not None:
            wanted, state = reference.consolidate(chunk, wanted), exported.consolidate(chunk.to(exported.device), state)
            found.states(STRESS if number == REPEATED else SLEEP, exported.plain(state), wanted)
    if SLEEPING in exported.bundle.graphs:
        _alone(found, exported, ids[:1], torch.cat(answers, dim=1))
    return found.parity(str(reference.embed.weight.dtype).removeprefix("torch."))


def stream(model: Model, window: int) -> Tensor:
    """Return the tokens that `verify` reads: [2, 3.5 windows], or one window for models that never sleep."""
    sleeps = model.config.window is not None
    ids = torch.randint(model.config.vocab_size, (BATCH, (WINDOWS if sleeps else 1) * window), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : ids.shape[1] - window // 2] if sleeps else ids
    ids[:, REPEATED * window : (REPEATED + 1) * window] = ids[:, :1]
    return ids


def _loss(model: Model, exported: ExportedModel, ids: Tensor) -> Loss:
    """Compare the bundle as it runs with PyTorch and the original weights, on the stream ids [2, T]."""
    places = (exported, exported.device), (model, model.embed.weight.device)
    logits, wanted = (torch.cat(list(_logits(each, ids.to(device))), dim=1).cpu().float() for each, device in places)
    apart = (logits - wanted).abs() / wanted.std().clamp(min=1)
    truth = wanted.log_softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), truth, log_target=True, reduction="none").sum(-1).mean()
    plan = exported.bundle.plan
    stored = f"{plan.weights} weights, {'exact' if plan.exact_activations else 'int8'} activations"
    agreement = (logits.argmax(-1) == wanted.argmax(-1)).float().mean()
    return Loss(stored, divergence.item(), Difference(apart.max().item(), apart.mean().item()), agreement.item())


def _logits(model: Model | ExportedModel, ids: Tensor) -> Iterator[Tensor]:
    """Yield the logits of each window of a stream, with a sleep after each."""
    state, window = model.init_state(len(ids)), model.config.window
    for chunk in ids.split(window or ids.shape[1], dim=1):
        yield model(chunk, state).logits
        if window is not None:
            state = model.consolidate(chunk, state)


def _awake(found: _Findings, reference: Model, exported: ExportedModel, chunk: Tensor, wanted: State, state: State) -> Tensor:
    """Compare the wake passes over one window. Returns PyTorch's logits."""
    T = chunk.shape[1]
    whole, after = reference(chunk, wanted)
    if T <= STEPPED or exported.bundle.plan.prefill:
        logits, read = exported(chunk.to(exported.device), state)
        found.logits(CHUNK, logits, whole)
        found.states(CHUNK, exported.plain(read), after)
    few = STEPPED // 4
    for start, end in [(0, T)] if T <= STEPPED else [(0, few), (T // 2, T // 2 + few), (T - few, T)]:
        there = wanted if start == 0 else reference(chunk[:, :start], wanted).state
        mine = state if start == 0 else exported.ringed(_like(there, state))
        for token in chunk[:, start:end].split(1, dim=1):
            want, there = reference(token, there)
            logits, mine = exported(token.to(exported.device), mine)
            found.logits(TOKEN, logits, want)
        found.states(TOKEN, exported.plain(mine), there)
    return whole


def _alone(found: _Findings, exported: ExportedModel, ids: Tensor, wanted: Tensor) -> None:
    """Compare the graph that sleeps by itself on ids [1, T]: half a window, a token, then pieces of a window, which cross its end."""
    run = providers.get(exported.provider)(exported.folder, exported.bundle, SLEEPING)
    _, *states = exported.bundle.graphs[SLEEPING].inputs
    carried = {spec.name: torch.zeros([int(size) for size in spec.shape], dtype=getattr(torch, spec.dtype)) for spec in states}
    window, read = exported.bundle.window, 0
    for piece in (*ids[:, : window // 2 + 1].tensor_split([window // 2], dim=1), *ids[:, window // 2 + 1 :].split(window, dim=1)):
        if not piece.numel():
            continue
        out = run({"input_ids": piece.to(exported.device), **carried})
        read += piece.shape[1]
        found.logits(ALONE, out["logits"], wanted[:, read - 1 : read])
        carried = {name: out[name.replace(PAST, PRESENT)] for name in carried}


def _like(state: State, graph: State) -> State:
    """Move a state of PyTorch to the device and the precision of the graph's."""
    leaves, form = tree_flatten(state)
    pairs = zip(leaves, tree_leaves(graph), strict=True)
    moved: State = tree_unflatten([x.to(own) if isinstance(x, Tensor) else x for x, own in pairs], form)
    return moved

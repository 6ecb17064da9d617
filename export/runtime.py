"""A bundle on onnxruntime, with the interface of the PyTorch model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.eviction import evictions
from zoo.export.manifest import CONSOLIDATION, PREDICTION, Bundle
from zoo.export.ring import PAST, PRESENT, pack, unpack, with_rings
from zoo.kernels.registry import Registry, ZooError
from zoo.model import Output, State
from zoo.session import Session
from zoo.weights import create

try:
    import onnxruntime
except ImportError:
    raise ZooError("export: needs pip install 'sleep-zoo[onnx]'") from None


class Runner(Protocol):
    """One graph of a bundle, as a function of tensors by name."""

    device: torch.device
    """Where its tensors live."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output by its name in the graph, of these inputs; there may be more of them than the graph has. Changes none."""
        ...


def _register() -> None:
    for module in MODULES:
        importlib.import_module(module)


MODULES = ("zoo.export.tensorrt_runtime",)  # each registers a provider

# a provider opens a graph: (folder of the bundle, its manifest, file name of the graph) -> Runner
providers: Registry[Callable[[Path, Bundle, str], Runner]] = Registry("provider", "providers", _register)


def load(path: str | Path, *, provider: str = "cpu", batch_size: int = 1) -> Session:
    """A session on the bundle that `zoo-export` wrote to the folder `path`.

    Args:
        provider: what runs the graphs: "cpu" and "cuda" are onnxruntime's, "tensorrt" runs the engines beside them.
    Raises:
        ZooError: a file that is missing, damaged, or of another bundle; a provider that is not there.
    """
    return Session(ExportedModel(Path(path), provider), batch_size)


class ExportedModel:
    """The graphs of a bundle, with the interface of the PyTorch model. States are never changed in place.

    Raises:
        ZooError: as `load`.
    """

    def __init__(self, folder: Path, provider: str = "cpu") -> None:
        bundle = Bundle.read(folder)
        self.config = bundle.config
        self._window: int = self.config.window  # type: ignore[assignment]
        self._restarts = evictions.get(self.config.evict).restarts
        self._shapes = create(self.config, device="meta")
        opened = providers.get(provider)
        self._prediction = opened(folder, bundle, PREDICTION)
        self._consolidation = opened(folder, bundle, CONSOLIDATION)
        self.device = self._prediction.device

    def init_state(self, batch_size: int = 1) -> State:
        """The state of `batch_size` streams before their first token."""
        like = with_rings(self._shapes.init_state(batch_size), self._window)
        return unpack(
            {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device) for name, tensor in pack(like, PAST).items()},
            PAST,
            like,
        )

    def __call__(self, ids: Tensor, state: State) -> Output:
        """One wake pass over ids: [B, T] int64, token by token.

        Raises:
            ZooError: the tokens do not fit into the window that the state has open.
        """
        self._check(ids, state)
        if self._restarts and state.position + ids.shape[1] > self._window:
            raise ZooError(
                f"ids: {ids.shape[1]} tokens do not fit into a window of {self._window} that holds {state.position}; consolidate it first"
            )
        logits = []
        for t in range(ids.shape[1]):
            out = self._prediction({"input_ids": ids[:, t : t + 1], "position": torch.tensor(state.position + t), **pack(state, PAST)})
            logits.append(out["logits"])
            state = unpack(out, PRESENT, state)
        return Output(torch.cat(logits, dim=1), state._replace(position=state.position + ids.shape[1]))

    def consolidate(self, ids: Tensor, state: State) -> State:
        """Sleep on one whole chunk, then evict.

        Args:
            ids: the chunk's tokens, [B, T] int64, T at most the window.
            state: as it stood at the chunk's start.
        Raises:
            ZooError: more tokens than the window holds, or a state within a window that restarts.
        """
        self._check(ids, state)
        T = ids.shape[1]
        if self._window < T:
            raise ZooError(f"ids: {T} tokens are more than one window of {self._window}")
        if self._restarts and state.position:
            raise ZooError(f"state: at position {state.position}; a sleep starts from the state at its window's start")
        padded = F.pad(ids, (0, self._window - T))
        out = self._consolidation(
            {"input_ids": padded, "n_valid": torch.tensor(T), "position": torch.tensor(state.position), **pack(state, PAST)}
        )
        return unpack(out, PRESENT, state)._replace(position=0 if self._restarts else state.position + T)

    def _check(self, ids: Tensor, state: State) -> None:
        batch = next(iter(pack(state, PAST).values())).shape[0]
        if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] == 0:
            raise ZooError(f"ids {list(ids.shape)}: want [B, T] with B = {batch} and at least one token")


class OnnxRuntime:
    """A graph on onnxruntime, with as many threads as `torch.get_num_threads`."""

    def __init__(self, file: Path, provider: str) -> None:
        if provider not in onnxruntime.get_available_providers():
            raise ZooError(f"provider: this onnxruntime has no {provider}; it has {', '.join(onnxruntime.get_available_providers())}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that states which never change in place are copied
        options.intra_op_num_threads = torch.get_num_threads()
        self.device = torch.device("cpu")
        self._session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays: list[np.ndarray] = self._session.run(None, {name: tensors[name].numpy() for name in self._inputs})
        return dict(zip(self._outputs, map(torch.from_numpy, arrays), strict=True))


providers.register("cpu", lambda folder, bundle, name: OnnxRuntime(folder / name, "CPUExecutionProvider"))
providers.register("cuda", lambda folder, bundle, name: OnnxRuntime(folder / name, "CUDAExecutionProvider"))

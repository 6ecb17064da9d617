"""A bundle on onnxruntime, with the interface of the PyTorch model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.eviction import evictions
from zoo.export.manifest import CONSOLIDATION, PREDICTION, Bundle
from zoo.export.ring import PAST, PRESENT, pack, unpack, with_rings
from zoo.kernels.registry import ZooError
from zoo.model import Output, State
from zoo.session import Session
from zoo.weights import create

try:
    import onnxruntime
except ImportError:
    raise ZooError("export: needs pip install 'sleep-zoo[onnx]'") from None


def load(path: str | Path, *, batch_size: int = 1) -> Session:
    """A session on the bundle that `zoo-export` wrote to the folder `path`.

    Raises:
        ZooError: a file that is missing, damaged, or of another bundle.
    """
    return Session(OnnxModel(Path(path)), batch_size)


class OnnxModel:
    """The two graphs of a bundle on the CPU, with as many threads as `torch.get_num_threads`. States are never changed in place.

    Raises:
        ZooError: as `load`.
    """

    def __init__(self, folder: Path) -> None:
        self.config = Bundle.read(folder).config
        self._window: int = self.config.window  # type: ignore[assignment]
        self._restarts = evictions.get(self.config.evict).restarts
        self._shapes = create(self.config, device="meta")
        self._prediction = _Graph(folder / PREDICTION)
        self._consolidation = _Graph(folder / CONSOLIDATION)

    def init_state(self, batch_size: int = 1) -> State:
        """The state of `batch_size` streams before their first token."""
        like = with_rings(self._shapes.init_state(batch_size), self._window)
        return unpack({name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in pack(like, PAST).items()}, PAST, like)

    def __call__(self, ids: Tensor, state: State) -> Output:
        """One wake pass over ids: [B, T] int64, token by token.

        Raises:
            ZooError: the tokens do not fit into the window that the state has open.
        """
        past = self._open(ids, state)
        if self._restarts and state.position + ids.shape[1] > self._window:
            raise ZooError(
                f"ids: {ids.shape[1]} tokens do not fit into a window of {self._window} that holds {state.position}; consolidate it first"
            )
        logits = []
        for t in range(ids.shape[1]):
            out = self._prediction({"input_ids": ids[:, t : t + 1], "position": torch.tensor(state.position + t), **past})
            logits.append(out.pop("logits"))
            past = out
        state = unpack(past, PAST, state)
        return Output(torch.cat(logits, dim=1), state._replace(position=state.position + ids.shape[1]))

    def consolidate(self, ids: Tensor, state: State) -> State:
        """Sleep on one whole chunk, then evict.

        Args:
            ids: the chunk's tokens, [B, T] int64, T at most the window.
            state: as it stood at the chunk's start.
        Raises:
            ZooError: more tokens than the window holds, or a state within a window that restarts.
        """
        past = self._open(ids, state)
        T = ids.shape[1]
        if self._window < T:
            raise ZooError(f"ids: {T} tokens are more than one window of {self._window}")
        if self._restarts and state.position:
            raise ZooError(f"state: at position {state.position}; a sleep starts from the state at its window's start")
        padded = F.pad(ids, (0, self._window - T))
        out = self._consolidation({"input_ids": padded, "n_valid": torch.tensor(T), "position": torch.tensor(state.position), **past})
        return unpack(out, PAST, state)._replace(position=0 if self._restarts else state.position + T)

    def _open(self, ids: Tensor, state: State) -> dict[str, Tensor]:
        """The state's tensors by name, once it is known that ids continue it."""
        past = pack(state, PAST)
        batch = next(iter(past.values())).shape[0]
        if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] == 0:
            raise ZooError(f"ids {list(ids.shape)}: want [B, T] with B = {batch} and at least one token")
        return past


class _Graph:
    """An ONNX graph as a function of tensors by name. States come out under the names by which they go in."""

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that states which never change in place are copied
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name.replace(f"{PRESENT}.", f"{PAST}.") for value in self._session.get_outputs()]

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays: list[np.ndarray] = self._session.run(None, {name: tensors[name].numpy() for name in self._inputs})
        return dict(zip(self._outputs, map(torch.from_numpy, arrays), strict=True))

"""The provider `tensorrt`: runs the engines of a bundle on torch tensors, without copies."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.export.manifest import PREDICTION, Bundle, EngineSpec
from zoo.export.ring import PAST, PRESENT
from zoo.export.runtime import providers

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


def open_engine(folder: Path, bundle: Bundle, graph: str) -> Engine:
    """Open the engine of one graph of the bundle in `folder`.

    Raises:
        ZooError: the bundle has no such engine, there is no GPU, another version of TensorRT is installed, or the file does not
            load on this GPU.
    """
    name = Path(graph).with_suffix(".engine").name
    if name not in bundle.engines:
        raise ZooError(f"{folder}: has no {name}; zoo-export --target tensorrt writes one")
    return (Step if graph == PREDICTION else Engine)(folder / name, bundle.engines[name])


providers.register("tensorrt", open_engine)


class Engine:
    """One engine as a function of named tensors. Outputs are new tensors."""

    def __init__(self, file: Path, spec: EngineSpec) -> None:
        self.device = _gpu()
        self._batch = spec.batch
        self._trt = _package(file, spec)
        log = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(log)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            built_for = ", ".join(spec.compute_capability) or "its default"
            here = ".".join(map(str, torch.cuda.get_device_capability()))
            raise ZooError(f"{file}: built for compute capability {built_for}; this GPU has {here}")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._dtypes = {name: DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        # outputs that must share memory with an input: caches written by TensorScatter
        self._in_place = {name: source for name in self._outputs if (source := self._engine.get_aliased_input_tensor(name))}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: tensors[name].to(self.device, self._dtypes[name]).contiguous() for name in self._inputs}
        given |= {name: given[name].clone() for name in self._in_place.values()}
        made = self._bind(self._only_context, given)
        self._enqueue(self._only_context)
        return made

    @functools.cached_property
    def _only_context(self) -> Any:
        return self._context()

    def _bind(self, context: Any, given: Mapping[str, Tensor], outputs: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        """Bind the inputs and outputs of a context; missing outputs are allocated, or share memory with their input."""
        for name, tensor in given.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self._batch
                raise ZooError(
                    f"{name} {list(tensor.shape)}: the engine takes a batch of {low} to {high}, and otherwise the shapes in bundle.json"
                )
        made = {}
        for name in self._outputs:
            if name in outputs:
                made[name] = outputs[name]
            elif name in self._in_place:
                made[name] = given[self._in_place[name]]
            else:
                made[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtypes[name], device=self.device)
        for name, tensor in {**given, **made}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        return made

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(_stream()):
            raise ZooError(f"{self._trt.__name__}: the engine failed; see the messages of TensorRT on stderr")

    def _context(self) -> Any:
        config = self._engine.create_runtime_config()
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):  # TensorRT-RTX: do not compile in the background
            config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        context = self._engine.create_execution_context(config)
        if context is None:
            raise ZooError(f"{self._trt.__name__}: not enough GPU memory for the engine's workspace")
        return context


class Step(Engine):
    """The engine for one token, run as a CUDA graph over fixed buffers.

    Caches are updated in place. Other states alternate between two buffers, with one graph per direction. The state returned
    by the previous call is used without a copy; any other state is copied in first. Each call therefore overwrites the
    state returned by the previous one.
    """

    def __init__(self, file: Path, spec: EngineSpec) -> None:
        super().__init__(file, spec)
        self._streams = 0
        self._sides: list[dict[str, Tensor]] = []  # the two sets of input buffers
        self._graphs: list[Callable[[], None]] = []  # one per direction
        self._side = 0
        self._own: set[int] = set()
        self._last: dict[str, Tensor] = {}
        self._logits = torch.empty(0)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        streams = tensors["input_ids"].shape[0]
        if streams != self._streams:
            self._prepare({name: tensors[name] for name in self._inputs})
            self._streams = streams
        new = {name: tensors[name] for name in self._inputs if tensors[name] is not self._last.get(name)}
        for name, tensor in new.items():
            if tensor.data_ptr() in self._own:
                raise ZooError(f"{name}: belongs to a state that was already continued and overwritten; clone a state to continue it twice")
        for name, tensor in new.items():
            self._sides[self._side][name].copy_(tensor, non_blocking=True)
        self._graphs[self._side]()
        self._side = 1 - self._side
        self._last = {name: tensor.detach() for name, tensor in self._sides[self._side].items() if name.startswith(PAST)}
        return {"logits": self._logits.clone()} | {_present(name): tensor for name, tensor in self._last.items()}

    def _prepare(self, like: Mapping[str, Tensor]) -> None:
        """Allocate buffers for inputs like these, and capture the two graphs."""
        self._streams, self._side, self._last = 0, 0, {}
        first = {name: torch.zeros(tensor.shape, dtype=self._dtypes[name], device=self.device) for name, tensor in like.items()}
        shared = {*self._in_place.values(), *(name for name in first if not name.startswith(PAST))}
        self._sides = [first, {name: tensor if name in shared else torch.zeros_like(tensor) for name, tensor in first.items()}]
        self._own = {tensor.data_ptr() for side in self._sides for tensor in side.values()}
        self._graphs = []
        given: dict[str, Tensor] = {}
        for before, after in (self._sides, self._sides[::-1]):
            context = self._context()
            given |= {_present(name): tensor for name, tensor in after.items() if name.startswith(PAST)}
            given["logits"] = self._logits = self._bind(context, before, given)["logits"]
            self._graphs.append(_captured(context, functools.partial(self._enqueue, context)))


def _captured(context: Any, enqueue: Callable[[], None]) -> Callable[[], None]:
    """Capture `enqueue` as a CUDA graph if TensorRT allows it. The bound tensors must not move."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first runs allocate and compile, which cannot be captured
        enqueue()
        enqueue()
    torch.cuda.current_stream().wait_stream(side)
    if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(side.cuda_stream):
        return enqueue
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a sleep may run in another thread
        enqueue()
    return graph.replay


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise ZooError("provider: tensorrt needs an NVIDIA GPU, and torch finds none; use provider cpu to run the graphs")
    return torch.device("cuda", torch.cuda.current_device())


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _package(file: Path, spec: EngineSpec) -> Any:
    """Import the TensorRT that built an engine; no other version can read it."""
    name = spec.built_by.split()[0]
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError):
        raise ZooError(f"{file}: built by {spec.built_by}, but {name} is not installed; pip install {name}") from None
    if f"{name} {trt.__version__}" != spec.built_by:
        raise ZooError(f"{file}: built by {spec.built_by}, but {name} {trt.__version__} is installed; export the model again")
    return trt


def _present(name: str) -> str:
    return PRESENT + name.removeprefix(PAST)

"""Run a bundle through the interface of the PyTorch model; onnxruntime is the default provider."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks.attention import KV
from zoo.errors import ZooError, counted
from zoo.eviction import evictions
from zoo.export.manifest import CODA, CONSOLIDATION, HEAD, PASS, PREDICTION, PREFILL, PRELUDE, SLEEPING, WEIGHTS, Bundle
from zoo.export.plan import Plan
from zoo.export.ring import PAST, PRESENT, RingKV, pack, unpack, with_caches, with_rings
from zoo.export.slots import BoundSlots
from zoo.factory import create
from zoo.files import as_path
from zoo.inputs import StateForm, check_count, check_ids, check_range
from zoo.registry import Registry
from zoo.sessions.session import Session
from zoo.sessions.sliced import Slice, finish
from zoo.state import Output, State
from zoo.system import release_threads

try:
    import onnxruntime
except ImportError:
    raise ZooError("export: needs pip install 'sleep-zoo[onnx]'") from None


STEP = 14  # the prefill graph of T tokens takes about as long as 1 + T / STEP tokens one at a time


class Runner(Protocol):
    """One graph of a bundle as a function of named tensors."""

    device: torch.device
    """Device of its inputs and outputs."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every output of the graph by name. Inputs are not modified; names that the graph lacks are ignored."""
        ...


# a provider opens one graph: (bundle folder, manifest, file name of the graph) -> Runner
providers: Registry[Callable[[Path, Bundle, str], Runner]] = Registry("provider", "providers", "zoo.export.*.runtime")


def load(path: str | Path, *, provider: str = "cpu", batch_size: int = 1) -> Session:
    """Open the bundle that `zoo-export` wrote to the folder `path`.

    Args:
        provider: runtime that executes the graphs. "cpu" and "cuda" are onnxruntime's and do not support bfloat16;
            "tensorrt" runs the engines next to the graphs.
    Raises:
        ZooError: a file is missing, damaged or from another bundle, or the provider is unavailable.
    """
    return Session(ExportedModel(as_path(path), provider), batch_size)


class ExportedModel:
    """The graphs of a bundle with the interface of the PyTorch model; a `SleepingModel`. Only `slots` modify states in place.

    Args:
        exact_activations: do not round activations before products with integer weights, which `zoo.export.plan.Plan` can also
            ask for. This is slow for bundles that were not exported that way.
    Raises:
        ZooError: as in `load`.
    """

    keeps_hidden = False

    def __init__(self, folder: Path, provider: str = "cpu", *, exact_activations: bool = False) -> None:
        self.folder, self.provider = folder, provider
        bundle = Bundle.read(folder)
        plan = bundle.plan.model_copy(update={"exact_activations": exact_activations or bundle.plan.exact_activations})
        self.bundle = bundle.model_copy(update={"plan": plan})
        self.config = self.bundle.config
        self.fingerprint = self.bundle.fingerprint
        self._slots = self.bundle.window
        self.max_length = None if self.config.window is not None else self._slots
        """Maximum number of tokens in a stream, for models that never evict."""
        self._eviction = evictions.get(self.config.evict)
        self._shapes = create(self.config, device="meta", dtype=getattr(torch, self.bundle.precision))
        self.like = with_rings(self._shapes.init_state(), self._slots)
        """State of one stream on the meta device."""
        self._form = StateForm.of(self.like)
        self._graphs = {name: self._open(name) for name in self.bundle.graphs if name not in (HEAD, SLEEPING)}
        self.device = self._graphs[PREDICTION].device

    def _open(self, graph: str) -> Runner:
        return providers.get(self.provider)(self.folder, self.bundle, graph)

    @functools.cached_property
    def _head(self) -> Runner:
        return self._open(HEAD)  # few callers want the logits of all tokens

    def init_state(self, batch_size: int = 1) -> State:
        """Return the state of `batch_size` streams before their first token."""
        like = with_rings(self._shapes.init_state(batch_size), self._slots)
        zeros = {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device) for name, tensor in pack(like, PAST).items()}
        return unpack(zeros, PAST, like)

    def __call__(self, ids: Tensor, state: State, *, logits_to_keep: int | None = None) -> Output:
        """Run one wake pass over ids [B, T] int64. Returns the logits of all tokens, or of the last `logits_to_keep`.

        Long inputs go through the prefill graph if the bundle has one and all streams are at the same position; otherwise tokens run
        one at a time. The position of the state is an int, or int64 [B], one per stream.

        Raises:
            ZooError: ids or a state that do not fit the bundle or each other, or more tokens than the window has room for.
        """
        self._check(ids, state)
        self.check_room(int(torch.as_tensor(state.position, device=self.device).max()), ids.shape[1])
        kept = ids.shape[1] if logits_to_keep is None else logits_to_keep
        logits = [torch.empty(ids.shape[0], 0, self.config.vocab_size, dtype=self._shapes.dtype, device=self.device)]
        prefill = self.bundle.plan.prefill
        while ids.shape[1]:
            position = torch.as_tensor(state.position, device=self.device)
            if prefill is None or ids.shape[1] <= 1 + prefill // STEP or position.ndim:
                piece, name = ids[:, :1], PREDICTION
                given, position = {"input_ids": piece}, position.expand(len(piece))
            else:
                piece, name = ids[:, :prefill], PREFILL
                given = self._padded(piece, prefill)
            given |= {"position": position, "position_ids": position.reshape(-1, 1).expand_as(given["input_ids"])}
            out = self._graphs[name](given | pack(state, PAST))
            n, ids = piece.shape[1], ids[:, piece.shape[1] :]
            state = unpack(out, PRESENT, state)._replace(position=state.position + n)
            read = kept - ids.shape[1]  # tokens of this piece whose logits are kept
            if read == 1 or (read > 1 and name == PREDICTION):
                logits.append(out["logits"])
            elif read > 1:
                logits.append(self._head(out)["logits"][:, max(0, n - read) : n])
        return Output(torch.cat(logits, dim=1), state)

    def consolidate(self, ids: Tensor, state: State, *, loops: int | None = None) -> State:
        """Sleep on one whole chunk, then evict.

        Args:
            ids: tokens of the chunk, [B, T] int64, T at most the window.
            state: state at the start of the chunk.
            loops: number of passes of the span; differs from `config.loops` only in bundles exported with --per-pass.
        Raises:
            ZooError: as a wake pass; also more tokens than the window holds, a state taken inside a window that restarts, a model
                that never sleeps, or a number of passes that the graph does not offer.
        """
        return finish(self.consolidate_in_slices(ids, state, loops=loops))

    def wake_pass(self, ids: Tensor, state: State, keep: int) -> tuple[Tensor, State, Tensor | None]:
        """Run one wake pass, without hidden states."""
        return *self(ids, state, logits_to_keep=keep), None

    async def wake_in_slices(self, ids: Tensor, state: State, keep: int) -> Output:
        """Run one wake pass in a single slice."""
        return self(ids, state, logits_to_keep=keep)

    async def consolidate_in_slices(
        self, ids: Tensor, state: State, *, loops: int | None = None, awake: tuple[Tensor, State] | None = None
    ) -> State:
        """Run `consolidate` in slices: one per pass in bundles exported with --per-pass, else a single one."""
        if not self._eviction.uses_window:
            raise ZooError(f"{self.config.name} never sleeps (evict '{self.config.evict}')")
        self._check(ids, state)
        T = ids.shape[1]
        if self._slots < T:
            raise ZooError(f"ids: {T} tokens are more than one window of {self._slots}")
        if self._eviction.restarts and state.position:
            raise ZooError(f"state: at position {state.position}; a sleep starts from the state at the start of its window")
        loops = self.config.loops if loops is None else loops
        self.check_loops(loops)
        given = self._padded(ids, self._slots) | {"position": torch.tensor(state.position, device=self.device)} | pack(state, PAST)
        out = self._graphs[CONSOLIDATION](given) if CONSOLIDATION in self._graphs else (await self._pass_by_pass(given, loops))
        return unpack(out, PRESENT, state)._replace(position=0 if self._eviction.restarts else state.position + T)

    def check_loops(self, loops: int) -> None:
        """Refuse a number of passes that the graph of a sleep does not support. Raises ZooError."""
        check_count("loops", loops)
        if loops != self.config.loops and CONSOLIDATION in self._graphs:
            raise ZooError(f"loops: {loops}; this bundle was exported with {self.config.loops}; --per-pass allows any number")

    async def _pass_by_pass(self, given: dict[str, Tensor], loops: int) -> dict[str, Tensor]:
        out = dict(self._graphs[PRELUDE](given))
        h = first = out.pop("h")
        carried, after = given, {}
        for n in range(loops):
            await Slice()
            after = self._graphs[PASS](carried | {"pass": torch.tensor(n, device=self.device), "h": h, "first": first})
            h = after.pop("h_out")
            # fast weights carry over; every pass starts from the window cache at the start of the chunk
            carried = given | {name.replace(PRESENT, PAST): x for name, x in after.items() if name.endswith("recurrent_state")}
        return out | after | (self._graphs[CODA](given | {"h": h}) if CODA in self._graphs else {})

    def _padded(self, ids: Tensor, length: int) -> dict[str, Tensor]:
        T = ids.shape[1]
        return {"input_ids": F.pad(ids, (0, length - T)), "n_valid": torch.tensor(T, device=self.device)}

    def slots(self, streams: int) -> BoundSlots[Any] | None:
        """Return buffers that tokens are decoded in, on a CPU. Elsewhere, states are not changed in place."""
        graph = self._graphs[PREDICTION]
        return BoundSlots(self, graph, streams) if isinstance(graph, OnnxRuntime) and graph.on_cpu else None

    def plain(self, state: State) -> State:
        """Convert a state to the PyTorch model's form: growing caches, oldest token first."""
        position = int(state.position)

        def ordered(i: int, cache: Any) -> Any:
            if not isinstance(cache, RingKV):
                return cache
            reach = self._mixer(i).reach
            return cache.ordered(position, position if reach is None else min(position, reach - 1))

        return with_caches(state, ordered)._replace(position=position)

    def ringed(self, state: State) -> State:
        """Convert a state of the PyTorch model to the graphs' form, with ring caches. Raises ZooError: it is longer than these."""
        position = int(state.position)
        if self.max_length is not None and position > self.max_length:
            raise ZooError(f"position: {position}; this bundle was exported with a max_length of {self.max_length}")

        def ring(i: int, cache: Any) -> Any:
            return RingKV.of(cache, position, self._slots) if isinstance(cache, KV) else cache

        return with_caches(state, ring)._replace(position=position)

    def _mixer(self, i: int) -> Any:
        return self._shapes.blocks[i % len(self._shapes.blocks)].mixer

    @property
    def _slides(self) -> bool:
        return self._eviction.uses_window and not self._eviction.restarts

    def check_room(self, held: int, tokens: int) -> None:
        """Refuse tokens that do not fit into a window after the `held` ones. Raises ZooError."""
        if not self._slides and held + tokens > self._slots:
            fit = "does not fit" if tokens == 1 else "do not fit"
            raise ZooError(
                f"ids: {counted(tokens, 'token')} {fit} into a window of {self._slots} that holds {held}"
                + ("; consolidate it first" if self._eviction.uses_window else "")
            )

    def check_state(self, state: State, streams: int) -> None:
        """Refuse a state of another model or of another number of streams. Raises ZooError."""
        self._form.check(state, streams)

    def _check(self, ids: Tensor, state: State) -> None:
        check_ids(ids)
        if not ids.is_cpu and ids.device != self.device:  # a runner moves ids from the CPU to its GPU
            raise ZooError(f"ids: on {ids.device}; the bundle runs on {self.device}")
        if ids.is_cpu:
            check_range(ids, self.config.vocab_size)
        self.check_state(state, ids.shape[0])


SMALL = 2**25
"""Bytes of weights up to which every graph may have its packed copy; a process that runs a bundle takes ten times as much."""


def session_options(bundle: Bundle, file: Path) -> Any:
    """Return onnxruntime's options for the graph of a bundle in `file`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and warnings tell that rings are copied where they are not written in place
    options.intra_op_num_threads = torch.get_num_threads()
    # threads of graphs that rest would spin against those of the others; a pool shared by all graphs would make onnxruntime
    # refuse the sessions that other code opens in this process
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # a packed copy of every weight saves 5 to 30 % of the time of many tokens; without it, the mapped file is read
    mapped = bundle.plan.bits is None and (file.parent / WEIGHTS).stat().st_size > SMALL
    # onnxruntime 1.31 multiplies float16 by integers in a Loop wrongly if it packs them
    wrong = bundle.precision == "float16" and not bundle.plan.exact_activations
    if file.name != PREDICTION and (mapped or wrong):
        options.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in _integer_products(bundle.plan).items():
        options.add_session_config_entry(name, value)
    return options


def _integer_products(plan: Plan) -> dict[str, str]:
    """Return the settings of a session that choose how products with integer weights are computed."""
    if plan.bits is None:
        return {}
    if not plan.exact_activations:
        return {"session.qdq_matmulnbits_accuracy_level": "4"}
    exact = {"session.qdq_matmulnbits_accuracy_level": "1"}
    # fused products of 8 bits would dequantise every weight in every call; now this is done once, when a graph is opened
    return exact | ({"session.disable_quant_qdq": "1"} if plan.bits == 8 else {})


def _exact(file: Path) -> bytes:
    """Return the graph in `file` with products that do not round activations."""
    import onnx_ir as ir  # not needed to run a bundle

    model = ir.load(file)
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return ir.to_proto(model).SerializeToString()


class OnnxRuntime:
    """One graph on onnxruntime, with `torch.get_num_threads()` threads."""

    def __init__(self, file: Path, bundle: Bundle, provider: str) -> None:
        if bundle.precision == "bfloat16":
            raise ZooError("provider: onnxruntime has no bfloat16 kernels on a CPU, and numpy no bfloat16; allowed: tensorrt")
        if provider not in onnxruntime.get_available_providers():
            raise ZooError(f"provider: {provider} is not in this onnxruntime; allowed: {', '.join(onnxruntime.get_available_providers())}")
        options = session_options(bundle, file)
        self.device = torch.device("cpu")
        self.on_cpu = provider == "CPUExecutionProvider"
        self._file = file
        graph: str | bytes = str(file)
        if bundle.plan.exact_activations and bundle.plan.dialect == "ort":
            graph = _exact(file)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        self._session = self._calling(lambda: onnxruntime.InferenceSession(graph, options, providers=[provider], enable_fallback=0))
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def _calling(self, call: Callable[[], Any]) -> Any:
        release_threads()  # torch's would compete with those of the graph: they wait actively for some milliseconds
        try:
            return call()
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ZooError(f"{self._file}: onnxruntime: {' '.join(str(error).split())[:600]}") from None

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_names(self._inputs, tensors)
        given = {name: tensors[name].detach().numpy() for name in self._inputs}
        arrays: list[np.ndarray] = self._calling(lambda: self._session.run(None, given))
        return dict(zip(self._outputs, map(torch.from_numpy, arrays), strict=True))

    def _check_names(self, names: list[str], tensors: Mapping[str, Tensor]) -> None:
        if missing := set(names) - tensors.keys():
            raise ZooError(f"{self._file}: '{min(missing)}' is not an input or output of this bundle's graphs")

    def bind(self, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call that runs the graph in place: it reads its inputs from these tensors and writes its outputs into them."""
        self._check_names(self._inputs + self._outputs, tensors)
        binding = self._session.io_binding()
        for names, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for name in names:
                tensor = tensors[name]
                bind(name, "cpu", 0, tensor.numpy().dtype.type, list(tensor.shape), tensor.data_ptr())
        return lambda: self._calling(lambda: self._session.run_with_iobinding(binding))


providers.register("cpu", lambda folder, bundle, name: OnnxRuntime(folder / name, bundle, "CPUExecutionProvider"))
providers.register("cuda", lambda folder, bundle, name: OnnxRuntime(folder / name, bundle, "CUDAExecutionProvider"))

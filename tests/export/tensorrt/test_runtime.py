"""Sessions on engines. Without a GPU, a stand-in for TensorRT runs the graphs on the tensors that the runtime has bound."""

from __future__ import annotations

import ctypes
import shutil
import sys
import types

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.errors import ZooError
from zoo.export.manifest import Bundle, EngineSpec, digest
from zoo.export.ring import PAST, pack
from zoo.export.runtime import ExportedModel
from zoo.export.tensorrt import runtime
from zoo.export.tensorrt.target import TensorRT

BUILT_BY = "tensorrt_rtx 0.0"
MAX_BATCH = 4  # of the stand-in's engines
TYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}


class Engine:
    """Stand-in for the engine of an ONNX file; the engine file contains the path of the ONNX file."""

    def __init__(self, file):
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.values = self.inputs | self.outputs
        self.num_io_tensors = len(self.values)
        self.scatters = "TensorScatter" in {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}

    def get_tensor_name(self, i):
        return list(self.values)[i]

    def get_tensor_mode(self, name):
        return name in self.inputs

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(name=TYPES[self.values[name].type])

    def get_aliased_input_tensor(self, name):
        return name.replace("present", PAST) if self.scatters and name.endswith((".key", ".value")) else None

    def create_runtime_config(self):
        return types.SimpleNamespace()

    def create_execution_context(self, config):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine = engine
        self.batch = None
        self.addresses = {}

    def set_input_shape(self, name, shape):
        wanted = self.engine.inputs[name].shape
        if wanted:
            self.batch = shape[0]
        return len(shape) == len(wanted) and list(shape[1:]) == wanted[1:] and (not wanted or 1 <= shape[0] <= MAX_BATCH)

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else self.batch for size in self.engine.values[name].shape]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        return self.run(self.addresses)

    def run(self, addresses):
        engine = self.engine
        for name in engine.outputs:
            source = engine.get_aliased_input_tensor(name)
            assert (addresses[name] == addresses[source]) if source else addresses[name] not in {addresses[n] for n in engine.inputs}, name
        assert len({addresses[name] for name in engine.outputs}) == len(engine.outputs)
        results = engine.session.run(list(engine.outputs), {name: self.memory(name, addresses).copy() for name in engine.inputs})
        for name, result in zip(engine.outputs, results, strict=True):
            self.memory(name, addresses)[...] = result
        return True

    def memory(self, name, addresses):
        kind, shape = np.dtype("f4" if "float" in self.engine.values[name].type else "i8"), self.get_tensor_shape(name)
        size = int(np.prod(shape, dtype=int)) * kind.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(addresses[name]), kind).reshape(shape)


def captured(context, enqueue):
    """Behave like a captured CUDA graph: run once, then always use the current addresses."""
    enqueue()
    addresses = dict(context.addresses)
    return lambda: context.run(addresses)


@pytest.fixture
def tensorrt(monkeypatch):
    class Runtime:
        def __init__(self, log):
            pass

        def deserialize_cuda_engine(self, content):
            return Engine(content.decode()) if content.startswith(b"/") else None

    fake = types.SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__="0.0",
        Logger=types.SimpleNamespace,
        Runtime=Runtime,
        TensorIOMode=types.SimpleNamespace(INPUT=True),
    )
    fake.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr(runtime, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(runtime, "_stream", lambda: 0)
    monkeypatch.setattr(runtime, "_captured", captured)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return fake


def with_engines(folder, content=None):
    bundle = Bundle.read(folder)
    spec = EngineSpec(built_by=BUILT_BY, compute_capability=["8.0", "12.0"], batch=(1, 1, MAX_BATCH), layers=1, seconds=0, warnings=[])
    engines = {}
    for graph in bundle.graphs:
        engine = (folder / graph).with_suffix(".engine")
        engine.write_text(content or str(folder / graph))
        engines[engine.name] = spec
    hashes = {name: digest(folder / name) for name in engines}
    bundle.model_copy(update={"engines": engines, "sha256": bundle.sha256 | hashes}).write(folder)
    return folder


@pytest.fixture(params=["hard", "sliding"])
def made(request, bundles, tensorrt, tmp_path):
    """Return a model and a folder with its engines."""
    bundle = bundles(request.param)
    return bundle.model, with_engines(shutil.copytree(bundle.folder, tmp_path / "bundle"))


def stream(model, batch, tokens):
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_that_sleeps(made, batch):
    model, folder = made
    window = model.config.window
    ours, wanted = zoo.export.load(folder, provider="tensorrt", batch_size=batch), zoo.Session(model, batch)
    ids = stream(model, batch, 6 * window)
    for tokens in (window, 2, 1, window - 1, window + 1, window):
        now, ids = ids[:, :tokens], ids[:, tokens:]
        assert torch.allclose(ours.feed(now), wanted.feed(now), atol=1e-4)
        ours.sleep()
        wanted.sleep()
    assert all(map(torch.equal, ours.generate(ids[:, :1], 2 * window), wanted.generate(ids[:, :1], 2 * window)))


def test_states_stay_where_they_are(made):
    model, folder = made
    exported = ExportedModel(folder, "tensorrt")
    ids = stream(model, 2, 4)
    state = exported.init_state(2)
    places = []
    for token in ids.split(1, dim=1):
        state = exported(token, state).state
        places.append({name: tensor.data_ptr() for name, tensor in pack(state, PAST).items()})
    assert places[0] == places[2]
    assert places[1] == places[3]
    for name in places[0]:
        assert (places[0][name] == places[1][name]) == name.endswith((".key", ".value"))


def test_nothing_is_copied_between_tokens(made):
    class Copies(TorchDispatchMode):
        sizes = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                self.sizes += (args[0].numel(),)
            return func(*args, **kwargs or {})

    model, folder = made
    exported = ExportedModel(folder, "tensorrt")
    ids = stream(model, 2, 3)
    state = exported(ids[:, :1], exported.init_state(2)).state
    with Copies() as copies:
        for token in ids[:, 1:].split(1, dim=1):
            state = exported(token, state).state
    assert copies.sizes == (2, 2, 2, 2)  # input_ids and position, twice


def test_states_from_elsewhere_are_not_changed(made):
    """States from a sleep or a fresh stream, and clones, stay as they are."""
    model, folder = made
    exported = ExportedModel(folder, "tensorrt")
    ids = stream(model, 2, model.config.window)
    slept = exported.consolidate(ids, exported.init_state(2))
    before = {name: tensor.clone() for name, tensor in pack(slept, PAST).items()}
    first = exported(ids[:, :2], slept).logits
    exported.consolidate(ids, slept)
    assert all(torch.equal(before[name], tensor) for name, tensor in pack(slept, PAST).items())
    assert torch.equal(exported(ids[:, :2], slept).logits, first)


def test_a_state_that_was_overwritten_is_refused(made):
    model, folder = made
    exported = ExportedModel(folder, "tensorrt")
    ids = stream(model, 2, 3)
    one = exported(ids[:, :1], exported.init_state(2)).state
    two = exported(ids[:, 1:2], one).state
    with pytest.raises(ZooError, match="belongs to a state that was already continued"):
        exported(ids[:, 1:2], one)
    assert exported(ids[:, 2:], two).logits.shape == (2, 1, model.config.vocab_size)  # the refusal changed nothing


def test_other_numbers_of_streams(made):
    model, folder = made
    exported = ExportedModel(folder, "tensorrt")
    for batch in (1, 3, 1):
        ids = stream(model, batch, 3)
        assert torch.allclose(exported(ids, exported.init_state(batch)).logits, model(ids).logits, atol=1e-4)
    with pytest.raises(ZooError, match=r"\[5, 1\]: the engine takes a batch of 1 to 4"):
        exported(stream(model, 5, 1), exported.init_state(5))
    assert torch.allclose(exported(ids, exported.init_state(1)).logits, model(ids).logits, atol=1e-4)


def test_an_engine_of_many_tokens_changes_no_input(made):
    """In-place updates go to copies of the inputs."""
    model, folder = made
    spec = Bundle.read(folder).engines["prediction.engine"]
    engine = runtime.Engine(folder / "prediction.engine", spec)
    state = ExportedModel(folder, "cpu").init_state(2)
    given = {"input_ids": stream(model, 2, 1), "position": torch.zeros(2, dtype=torch.int64), **pack(state, PAST)}
    before = {name: tensor.clone() for name, tensor in given.items()}
    out = engine(given)
    assert torch.allclose(out["logits"], model(given["input_ids"]).logits, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in given.items())
    assert all(out[name.replace(PAST, "present")].any() for name in given if name.endswith((".key", ".value")))


def test_an_engine_that_does_not_load(bundles, tensorrt, tmp_path):
    folder = with_engines(shutil.copytree(bundles("sliding").folder, tmp_path / "bundle"), content="rubbish")
    with pytest.raises(ZooError, match=r"prediction.engine: built for compute capability 8.0, 12.0; this GPU has 9.0"):
        zoo.export.load(folder, provider="tensorrt")


def test_another_version_of_tensorrt(made, tensorrt, monkeypatch):
    tensorrt.__version__ = "0.1"
    with pytest.raises(ZooError, match=r"built by tensorrt_rtx 0.0, but tensorrt_rtx 0.1 is installed; export the model again"):
        zoo.export.load(made[1], provider="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ZooError, match=r"built by tensorrt_rtx 0.0, but tensorrt_rtx is not installed; pip install tensorrt_rtx"):
        zoo.export.load(made[1], provider="tensorrt")


def test_a_bundle_without_engines(bundles):
    with pytest.raises(ZooError, match=r"has no prediction.engine; zoo-export --target tensorrt writes one"):
        zoo.export.load(bundles("sliding").folder, provider="tensorrt")


def test_no_gpu(made, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ZooError, match="tensorrt needs an NVIDIA GPU, and torch finds none"):
        zoo.export.load(made[1], provider="tensorrt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="running an engine needs an NVIDIA GPU")
@pytest.mark.parametrize("case", ["hard", "sliding"])
def test_engines_on_the_gpu(bundles, tmp_path, case):
    model, folder, _ = bundles(case)
    folder = shutil.copytree(folder, tmp_path / "bundle")
    TensorRT().build(folder, Bundle.read(folder)).write(folder)
    window = model.config.window
    ours, wanted = zoo.export.load(folder, provider="tensorrt", batch_size=3), zoo.Session(model, 3)
    ids = stream(model, 3, 4 * window + 2)
    assert torch.allclose(ours.feed(ids).cpu(), wanted.feed(ids), atol=1e-4)
    made = [token.cpu() for token in ours.generate(ids[:, :1], 2 * window)]
    assert all(map(torch.equal, made, wanted.generate(ids[:, :1], 2 * window)))

"""Engines from the graphs of a bundle. TensorRT-RTX builds them without a GPU; running one needs a GPU."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch
from click.testing import CliRunner

import zoo
from zoo.config import validate
from zoo.errors import ZooError
from zoo.export.cli import main
from zoo.export.manifest import Bundle, digest
from zoo.export.plan import Plan
from zoo.export.tensorrt.build_engine import capabilities, grouped, profile
from zoo.export.tensorrt.target import TensorRT, check_space

TWO_GPUS = TensorRT(batch=(1, 2, 4), compute_capability=("8.0", "12.0"))


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="engines are built with tensorrt-rtx, which is not installed")


class Engines(NamedTuple):
    model: zoo.Model
    folder: Path
    bundle: Bundle


@pytest.fixture(scope="module")
def engines(rtx, bundles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(bundles("sliding").folder, folder)
    TWO_GPUS.build(folder, Bundle.read(folder)).write(folder)
    return Engines(bundles("sliding").model, folder, Bundle.read(folder))


def graph(file, *nodes, inputs=("x",), outputs=("y",), dtype=onnx.TensorProto.FLOAT, **opsets):
    """Write an ONNX file whose tensors are [batch, 3]."""
    values = [[onnx.helper.make_tensor_value_info(name, dtype, ["batch", 3]) for name in names] for names in (inputs, outputs)]
    imports = [onnx.helper.make_opsetid(domain.replace("_", "."), version) for domain, version in {"": 24, **opsets}.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", *values), opset_imports=imports, ir_version=12), file)
    return file


def build(graph, target=TWO_GPUS):
    return target.engine(target.toolkit("float32"), graph, graph.with_suffix(".engine"))


def embedding(folder):
    """Return the bytes of embed.weight in weights.bin."""
    graph = onnx.load(folder / "prediction.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == "embed.weight")
    place = {entry.key: entry.value for entry in tensor.external_data}
    return (folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]


def test_every_graph_has_an_engine(engines):
    graphs = ["prediction", "prefill", "head", "consolidation"]
    files = ["bundle.json", "weights.bin", *(f"{name}.{kind}" for name in graphs for kind in ("onnx", "engine"))]
    assert sorted(file.name for file in engines.folder.iterdir()) == sorted(files)
    manifest = json.loads((engines.folder / "bundle.json").read_text())
    assert manifest["engines"].keys() == {f"{name}.engine" for name in graphs}
    for name, spec in manifest["engines"].items():
        assert spec["built_by"].startswith("tensorrt_rtx ")
        assert (spec["compute_capability"], spec["batch"]) == (["8.0", "12.0"], [1, 2, 4])
        assert spec["layers"] > (1 if name == "head.engine" else 100)
        assert manifest["sha256"][name] == digest(engines.folder / name)


@pytest.mark.parametrize("name", ["prediction", "prefill", "consolidation"])
def test_the_weights_are_in_the_engine(engines, name):
    """The parser found weights.bin next to the graph. TensorRT merges matrices with a common input and keeps the others."""
    engine = (engines.folder / f"{name}.engine").read_bytes()
    used = {tensor.name for tensor in onnx.load(engines.folder / f"{name}.onnx", load_external_data=False).graph.initializer}
    whole = {name for name in used if name.endswith(("embed.weight", "o_proj.weight", "down_proj.weight", "norm.weight"))}
    assert len(whole) > 10
    for parameter, weight in engines.model.named_parameters():
        if parameter in whole:
            assert any(layout.detach().numpy().tobytes() in engine for layout in (weight, weight.t().contiguous())), parameter


@pytest.mark.parametrize("precision", ["float16", *(pytest.param(wider, marks=pytest.mark.extended) for wider in ("bfloat16", "float32"))])
def test_the_command(rtx, tmp_path, precision):
    out = tmp_path / "bundle"
    asked = ["--target", "tensorrt", "--dtype", precision, "--compute-capability", "8.0,12.0", "--no-verify", "--out", str(out)]
    small = ["--prefill", "0", "layers=gdn", "d_model=16", "d_ff=16", "blocks.gdn.heads=2"]  # whose block other tests trace, too
    result = CliRunner().invoke(main, ["gdn4-sleep4-hard6", *small, *asked])
    assert result.exit_code == 0, result.output
    bundle = Bundle.read(out)
    assert bundle.precision == precision
    assert bundle.engines.keys() == {"prediction.engine", "consolidation.engine"}
    stored = embedding(out)
    assert len(stored) == 3 * 16 * (4 if precision == "float32" else 2)
    for name, spec in bundle.engines.items():
        assert spec.compute_capability == ["8.0", "12.0"]
        assert stored in (out / name).read_bytes()  # stored without conversion
        assert f"{name}: {spec.layers} layers in " in result.output


@pytest.mark.parametrize("flag", ["--int4", pytest.param("--int8", marks=pytest.mark.extended)])
def test_engines_of_integers(rtx, tmp_path, flag):
    """In a Loop and in a tied embedding too."""
    small = ["layers=gdn", "d_model=16", "d_ff=16", "blocks.gdn.heads=2", "tie_embeddings=true"]  # whose block other tests trace, too
    asked = ["--target", "tensorrt", flag, "--prefill", "0", "--no-verify", "--out", str(tmp_path / "bundle")]
    result = CliRunner().invoke(main, ["gdn4-sleep4-hard6", *small, *asked])
    assert result.exit_code == 0, result.output
    assert Bundle.read(tmp_path / "bundle").engines.keys() == {"prediction.engine", "consolidation.engine"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--target", "tensorrt", "--dialect", "ort"], "dialect: TensorRT does not support 'ort'"),
        (["--target", "tensorrt", "--compute-capability", "9.0"], "compute-capability: '9.0' is not supported by tensorrt_rtx"),
        (["--target", "onnx", "--workspace", "1"], "--workspace: is not an option of target onnx"),
    ],
)
def test_the_command_refuses(rtx, tmp_path, asked, message):
    result = CliRunner().invoke(main, ["gdn4-sleep4", *asked, "--out", str(tmp_path / "bundle")])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_warnings_by_kind():
    warnings = ["Unused: past.1.key", "Unused:\n past.10.key", "[x] something else"]
    assert grouped(warnings, ["past.1.key", "past.10.key"]) == ["Unused: ... (2 times)", "[x] something else"]


def test_warnings_are_not_repeated(engines):
    for spec in engines.bundle.engines.values():
        assert len(spec.warnings) == len(set(spec.warnings)) < 5
        assert not any("past_key_values" in warning for warning in spec.warnings)
        assert str(spec).count("warning") == len(spec.warnings)


def test_capabilities_are_written_into_the_engine(rtx, tmp_path):
    file = graph(tmp_path / "g.onnx", onnx.helper.make_node("Relu", ["x"], ["y"]))
    made = {}
    for asked in (("8.0",), ("12.0",), ("8.0", "12.0")):
        build(file, TensorRT(compute_capability=asked))
        made[asked] = (tmp_path / "g.engine").read_bytes()
    assert len(set(made.values())) == 3


def test_capabilities_by_number(rtx):
    known = capabilities(rtx)
    assert known["8.0"] == rtx.ComputeCapability.SM80
    assert known["12.0"] == rtx.ComputeCapability.SM120
    assert "CURRENT" not in known


def test_batches_of_the_profile(rtx):
    log = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(log)
    network = builder.create_network()
    inputs = [network.add_input(name, rtx.float32, shape) for name, shape in {"x": (-1, 3), "position": (), "mask": (3, 3)}.items()]
    made = profile(builder, inputs, (1, 2, 4))
    assert [tuple(shape) for shape in made.get_shape("x")] == [(1, 3), (2, 3), (4, 3)]
    assert not made.get_shape("mask")


@pytest.mark.parametrize("name", ["prediction.engine", "consolidation.engine"])
def test_a_changed_engine_is_refused(engines, tmp_path, name):
    folder = shutil.copytree(engines.folder, tmp_path / "bundle")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ZooError, match=f"{name}: does not match bundle.json"):
        zoo.export.load(folder)
    (folder / name).unlink()
    with pytest.raises(ZooError, match=f"{name}: is missing"):
        zoo.export.load(folder)


def test_damaged_weights_become_no_engine(rtx, bundles, tmp_path):
    folder = shutil.copytree(bundles("sliding").folder, tmp_path / "bundle")
    with (folder / "weights.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ZooError, match=r"weights.bin: does not match"):
        TWO_GPUS.build(folder, Bundle.read(folder))
    assert not list(folder.glob("*.engine"))


@pytest.mark.parametrize(
    ("node", "opsets", "message"),
    [
        (onnx.helper.make_node("Nonsense", ["x"], ["y"], name="block/3", domain="com.microsoft"), {"com_microsoft": 1}, "Nonsense block/3"),
        (onnx.helper.make_node("CumProd", ["x", "axis"], ["y"], name="gate"), {}, "CumProd gate"),
    ],
)
def test_a_node_that_is_refused_is_named(rtx, tmp_path, node, opsets, message):
    axis = onnx.helper.make_node("Constant", [], ["axis"], value_int=1)
    file = graph(tmp_path / "g.onnx", axis, node, **({"": 26} if node.op_type == "CumProd" else opsets))
    with pytest.raises(ZooError, match=f"g.onnx: tensorrt_rtx .* refuses {message}: ") as caught:
        build(file)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_a_file_that_is_no_graph(rtx, tmp_path):
    (tmp_path / "g.onnx").write_bytes(b"nothing")
    with pytest.raises(ZooError, match=r"g.onnx: tensorrt_rtx .* refuses it"):
        build(tmp_path / "g.onnx")


def test_a_graph_that_tensorrt_crashes_on(rtx, tmp_path):
    """float32 Attention: a segmentation fault in TensorRT-RTX 1.7.1."""
    axes = onnx.helper.make_node("Constant", [], ["axes"], value_ints=[1, 2])
    q = onnx.helper.make_node("Unsqueeze", ["x", "axes"], ["q"])
    attention = onnx.helper.make_node("Attention", ["q", "q", "q"], ["o"])
    file = graph(tmp_path / "g.onnx", axes, q, attention, onnx.helper.make_node("Squeeze", ["o", "axes"], ["y"]))
    with pytest.raises(ZooError, match=r"g.onnx: tensorrt_rtx .* (crashes \(SIG|cannot build it)") as caught:
        build(file)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_a_full_disk_leaves_nothing(rtx, tmp_path):
    file = graph(tmp_path / "g.onnx", onnx.helper.make_node("Relu", ["x"], ["y"]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ZooError, match=r"g.onnx: tensorrt_rtx .* cannot write its engine: File too large"):
            build(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_a_disk_that_will_be_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3 << 30))
    check_space(tmp_path, 1 << 30, engines=2)
    with pytest.raises(ZooError, match=r"2 engines need about 4.1 GiB, and the disk has 3.0 GiB left"):
        check_space(tmp_path, 2 << 30, engines=2)


@pytest.mark.parametrize(
    ("asked", "precision", "message"),
    [
        ({"compute_capability": ["9.0"]}, "float32", r"compute-capability: '9.0' is not supported by .* allowed: 7.5, 8.0, .*12.0"),
        ({"compute_capability": ["7.5"]}, "bfloat16", "dtype: no bfloat16 at compute capability 7.5"),
        ({}, "float64", "dtype: TensorRT has no kernels for float64; allowed: float32, float16, bfloat16"),
        ({"batch": (1, 8, 4)}, "float32", r"batch: \(1, 8, 4\); want minimum, optimal and maximum"),
        ({"batch": (0, 1, 4)}, "float32", r"batch: \(0, 1, 4\)"),
        ({"workspace": 0}, "float32", "workspace: 0: must be greater than 0"),
        ({"timing_cache": Path("times")}, "float32", "timing-cache: tensorrt_rtx measures nothing"),
        ({"capability": ["8.0"]}, "float32", "capability: unknown field; did you mean 'compute_capability'"),
    ],
)
def test_settings_that_cannot_be(rtx, asked, precision, message):
    with pytest.raises(ZooError, match=message):
        validate(TensorRT, asked, "target tensorrt").check(precision, Plan())


@pytest.mark.parametrize(
    ("version", "gpu", "target", "message"),
    [
        (None, False, TensorRT(), r"tensorrt is not installed; pip install 'sleep-zoo\[tensorrt-rtx\]'"),
        ("11.4.0.106", False, TensorRT(), "tensorrt needs a GPU to build, and none is available; pip install"),
        ("11.4.0.106", True, TWO_GPUS, "tensorrt builds only for the local GPU; pip install"),
        ("10.14.1.48", True, TensorRT(), r"tensorrt 10.14.1.48: want 10.15 or newer"),
    ],
)
def test_no_tensorrt_that_fits(monkeypatch, version, gpu, target, message):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", version and types.SimpleNamespace(__name__="tensorrt", __version__=version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(ZooError, match=message):
        target.check("float32", Plan())


@pytest.mark.parametrize(
    ("gpu", "target", "chosen"), [(True, TensorRT(), "tensorrt"), (True, TWO_GPUS, "tensorrt_rtx"), (False, TensorRT(), "tensorrt_rtx")]
)
def test_which_tensorrt(rtx, monkeypatch, gpu, target, chosen):
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__name__="tensorrt", __version__="11.4.0.106"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = target.toolkit("float32")
    assert (found.trt.__name__, found.ahead) == (chosen, chosen == "tensorrt_rtx")

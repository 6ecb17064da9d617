"""The graph that sleeps by itself, in plain onnxruntime, and its folder in a repository of Triton Inference Server."""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

import zoo
from tests.export.conftest import ALL, build, graphs_in
from zoo.export import assembly, cli
from zoo.export.manifest import Bundle
from zoo.export.page import page
from zoo.export.plan import Plan
from zoo.export.runtime import ExportedModel
from zoo.export.verify import ALONE, TOLERANCE, verify

FLAGS = {"prefill": "--prefill {}", "dialect": "--dialect {}", "weights": "--{}"}


@pytest.fixture(scope="module")
def repositories(bundles, tmp_path_factory):
    """Add the model of a case to a model repository, as the command does; its graphs were traced for its bundle."""

    @functools.cache
    def repository(case):
        model, place = bundles(case).model, tmp_path_factory.mktemp(case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "_model", lambda *_, **__: model)
            patch.setattr(assembly, "build", build)
            plan = {"prefill": 0} | ALL[case][1]
            flags = [part for name, value in plan.items() for part in FLAGS[name].format(value).split()]
            result = CliRunner().invoke(cli.main, ["tiny", "--triton-server", str(place), *flags])
        assert result.exit_code == 0, result.output
        return model, place / model.config.name

    return repository


class Host:
    """A host that knows the graph alone: it calls it again and again, and every output is an input of the next call."""

    def __init__(self, file):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        types = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
        ids, *past = self.session.get_inputs()
        assert (ids.name, ids.shape) == ("input_ids", [1, "tokens"])
        self.states = {value.name: np.zeros(value.shape, types[value.type]) for value in past}

    def __call__(self, ids):
        names = [value.name for value in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(None, {"input_ids": np.array([ids], np.int64), **self.states}), strict=True))
        logits = out.pop("logits")
        self.states = {name.replace("present", "past_key_values"): array for name, array in out.items()}
        return logits


@pytest.mark.parametrize("case", ["hard", "sliding"])
def test_500_tokens_are_those_of_pytorch(repositories, case):
    """Tokens that the two choose themselves, between pieces from outside, of up to more than two windows."""
    model, folder = repositories(case)
    host, session, window = Host(folder / "1/sleeping.onnx"), zoo.Session(model), model.config.window
    sizes = itertools.cycle([window + 2, 0, 0, 1, window - 1, 0, 2 * window + 1, 0, window, 2])
    draw, read, said = np.random.default_rng(0), 0, ([], [])
    while read < 500:
        piece = [*said[1][-1:], *draw.integers(0, model.config.vocab_size, next(sizes)).tolist()]
        read += len(piece)
        found, wanted = host(piece), session.feed(torch.tensor([piece]))[:, -1:].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-3)
        for token, logits in zip(said, (found, wanted), strict=True):
            token.append(int(logits.argmax()))
    assert said[0] == said[1]
    assert len(set(said[0])) > 3
    assert session.stats().sleeps > 80
    assert host.states["past_key_values.window.length"] == (read - 1) % window + 1


@pytest.mark.parametrize("case", ["hard", "sliding"])
@pytest.mark.parametrize("ids", [[], [-1], [11], [1, 2, -1, 3]], ids=["none", "negative", "large", "among others"])
def test_no_tokens_and_tokens_outside_the_vocabulary_are_refused(repositories, case, ids):
    model, folder = repositories(case)
    assert model.config.vocab_size == 11
    host = Host(folder / "1/sleeping.onnx")
    host([0, 10])
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"):
        host(ids)


@pytest.mark.extended
@pytest.mark.parametrize("case", ["int4", "ort-int8", "ort"])
def test_every_form_is_compared_with_pytorch(repositories, case):
    model, folder = repositories(case)
    parity = verify(model, ExportedModel(folder / "1"))
    assert parity.differences[ALONE, "logits"].maximum <= TOLERANCE[ExportedModel(folder / "1").bundle.precision]


def test_a_graph_that_does_not_sleep_is_refused(bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "build", build)
    monkeypatch.setattr("zoo.export.sleeping.SelfSleeping._slept", lambda self, write, full, now: {})
    plan = Plan(prefill=None, self_sleeping=True)
    with pytest.raises(zoo.ZooError, match="sleeping by itself: the graph differs"):
        zoo.export.export(bundles("hard").model, tmp_path / "new", plan=plan)
    assert not list(tmp_path.iterdir())


def test_the_page_has_every_state(repositories):
    bundle = Bundle.read(repositories("sliding")[1] / "1")
    text = page(bundle)
    assert "sleeping(input_ids = tokens, states)" in text
    for tensor in bundle.graphs["sleeping.onnx"].inputs:
        assert f"| `{tensor.name}` | `{tensor.name.replace('past_key_values', 'present')}` |" in text or tensor.name == "input_ids"


@pytest.mark.parametrize("case", ["hard", "sliding"])
def test_standard_operators_and_unique_names(repositories, case):
    file = repositories(case)[1] / "1/sleeping.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    graphs = list(graphs_in(model.graph))
    names = [name for graph in graphs for node in graph.node for name in node.output if name]
    names += [value.name for graph in graphs for value in (*graph.input, *graph.initializer)]
    assert len(set(names)) == len(names)
    stored = {tensor.name for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL}
    assert stored == {name for name, _ in repositories(case)[0].named_parameters()}


def test_the_reference_evaluator_computes_the_same(repositories):
    model, folder = repositories("hard")
    file = folder / "1/sleeping.onnx"
    host, ids = Host(file), np.arange(2 * model.config.window + 1)[None] % 11
    given = {"input_ids": ids, **host.states}
    names = [value.name for value in host.session.get_outputs()]
    found, wanted = ReferenceEvaluator(str(file)).run(None, given), host.session.run(None, given)
    for name, a, b in zip(names, found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)


def parsed(text):
    """Read protobuf's text format: fields as a mapping of name to a list of values. A list in brackets repeats the field."""
    tokens = iter(re.findall(r'"[^"]*"|[\w.-]+|[{}\[\]:,]', text))

    def message():
        fields = {}
        for token in tokens:
            if token == "}":
                break
            if token != ",":
                fields.setdefault(token, []).extend(values(next(tokens)))
        return fields

    def values(token):
        token = next(tokens) if token == ":" else token
        if token == "{":
            return [message()]
        if token == "[":
            return [value for item in iter(lambda: next(tokens), "]") if item != "," for value in values(item)]
        return [token[1:-1] if token[0] == '"' else int(token) if token.lstrip("-").isdigit() else token]

    return message()


@pytest.mark.parametrize("case", ["hard", "sliding"])
def test_the_states_of_the_config_are_those_of_the_graph(repositories, case):
    """Name, type, shape and initial value of every state."""
    _, folder = repositories(case)
    assert sorted(file.name for file in folder.iterdir()) == ["1", "config.pbtxt", "configs"]
    config = parsed((folder / "config.pbtxt").read_text())
    assert (config["backend"], config["max_batch_size"], config["default_model_filename"]) == (["onnxruntime"], [0], ["sleeping.onnx"])
    graph = onnx.load(folder / "1/sleeping.onnx", load_external_data=False).graph
    types = {"TYPE_FP32": onnx.TensorProto.FLOAT, "TYPE_INT64": onnx.TensorProto.INT64}

    def described(values):
        return {
            value.name: (value.type.tensor_type.elem_type, [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim])
            for value in values
        }

    def configured(tensors, name):
        return {tensor[name][0]: (types[tensor["data_type"][0]], tensor["dims"]) for tensor in tensors}

    inputs, outputs, states = described(graph.input), described(graph.output), config["sequence_batching"][0]["state"]
    assert configured(config["input"], "name") | configured(states, "input_name") == inputs
    assert configured(config["output"], "name") | configured(states, "output_name") == outputs
    assert len(states) == len(inputs) - 1
    for state in states:
        assert state["output_name"][0] == state["input_name"][0].replace("past_key_values", "present")
        (initial,) = state["initial_state"]
        assert initial["zero_data"] == ["true"]
        assert initial["name"]
        assert (initial["data_type"], initial["dims"]) == (state["data_type"], state["dims"])
        assert min(initial["dims"]) > 0


@pytest.mark.parametrize("case", ["hard", "sliding"])
def test_the_python_backend_has_the_same_input_and_output(repositories, case):
    """Its session keeps the states, so its config has none; it names the controls that `TritonPythonModel` reads."""
    _, folder = repositories(case)
    config, other = parsed((folder / "configs/python.pbtxt").read_text()), parsed((folder / "config.pbtxt").read_text())
    assert config["backend"] == ["python"]
    for field in ("input", "output", "max_batch_size"):
        assert config[field] == other[field]
    (batching,) = config["sequence_batching"]
    assert "state" not in batching
    kinds = {control["name"][0]: control["control"][0]["kind"][0] for control in batching["control_input"]}
    assert kinds == {name: f"CONTROL_SEQUENCE_{name}" for name in ("START", "END", "CORRID")}
    assert "TritonPythonModel" in (folder / "1/model.py").read_text()


REFUSED = {
    "never sleeps": (["evict=none", "window=null", "loops=1"], ["--max-length", "8"], "--self-sleeping: .* never sleeps"),
    "pass by pass": ([], ["--per-pass"], "--self-sleeping: .* pass by pass"),
    "an engine": ([], ["--target", "tensorrt"], "--self-sleeping: not supported by TensorRT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_before_anything_is_traced(tmp_path, monkeypatch, case):
    fields, flags, message = REFUSED[case]
    monkeypatch.setattr("zoo.export.assembly.build", None)
    result = CliRunner().invoke(cli.main, ["gdn4-sleep2-hard8", *fields, "--self-sleeping", "--out", str(tmp_path / "new"), *flags])
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert re.search(message, result.output)


def test_a_repository_refuses_types_and_names_that_it_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.export.assembly.build", None)
    (tmp_path / "gdn4-sleep2-hard8").mkdir()
    (tmp_path / "gdn4-sleep2-hard8/config.pbtxt").touch()
    for flags, message in ((["--dtype", "bfloat16"], "has no bfloat16"), ([], "already exists")):
        place = tmp_path if not flags else tmp_path / "other"
        result = CliRunner().invoke(cli.main, ["gdn4-sleep2-hard8", "--triton-server", str(place), *flags])
        assert (result.exit_code, message in result.output) == (2, True), result.output
    result = CliRunner().invoke(cli.main, ["gdn4-sleep2", "--triton-server", str(tmp_path / "gdn4-sleep2-hard8/config.pbtxt")])
    assert (result.exit_code, "config.pbtxt is a file; want a folder" in result.output) == (2, True), result.output
    result = CliRunner().invoke(cli.main, ["gdn4", "--triton-server", str(tmp_path), "--out", str(tmp_path / "new")])
    assert (result.exit_code, "want one of --out DIR, --triton-server DIR" in result.output) == (2, True)

"""Fewer operators in graphs: the same numbers."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from tests.export.conftest import graphs_in
from zoo.export.bundle import export
from zoo.export.plan import Plan
from zoo.export.products import of_one_input
from zoo.export.rewrites import rewrite_block, skip_reshapes
from zoo.export.runtime import ExportedModel
from zoo.export.trace import PARAMETER, tidy, trace
from zoo.kernels.l2norm.reference import normed


class Traced(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return {"y": self.function(inputs["x"])}


def rewritten(function, x):
    """Return the operators of the rewritten graph of a function, and its result."""
    model = trace(Traced(function), {"x": x}, {})
    rewrite_block(model, rotations=True)
    skip_reshapes(model.graph)
    tidy(model, ["y"])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in model.graph), torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


MOVES = {
    "there and back": (lambda x: 2 * x.unflatten(2, (4, 6)).transpose(1, 2).transpose(1, 2).flatten(2), {}),
    "to another shape": (lambda x: x.unflatten(2, (4, 6)).transpose(1, 2).transpose(1, 2).flatten(2).unflatten(2, (8, 3)), {"Reshape": 1}),
    "used on the way": (lambda x: (heads := x.unflatten(2, (4, 6)) + 1).flatten(2) + heads.sum((2, 3), keepdim=True)[..., 0], None),
}


@pytest.mark.parametrize("case", MOVES)
def test_one_token_is_not_moved(case):
    function, wanted = MOVES[case]
    x = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(0))
    operators, y = rewritten(function, x)
    assert torch.allclose(y, function(x))
    if wanted is not None:
        assert {name: count for name, count in operators.items() if name in ("Reshape", "Transpose")} == wanted


def test_several_tokens_are_moved():
    """A transposition of dimensions above 1 changes the order of the elements."""

    def function(x):
        return x.unflatten(2, (4, 6)).transpose(1, 2).flatten(2)

    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    operators, y = rewritten(function, x)
    assert torch.equal(y, function(x))
    assert operators["Transpose"] == 1


def test_a_shape_that_refers_to_the_input_keeps_its_input():
    """Reshape copies the sizes that are 0 from its own input."""
    x, middle, y = (ir.val(name, ir.DataType.FLOAT, shape) for name, shape in {"x": [6, 4], "middle": [2, 12], "y": [2, 3, 4]}.items())
    sizes = [ir.node("Constant", [], {"value_ints": shape}) for shape in ([2, 12], [0, 3, 4])]
    places = zip([x, middle], sizes, [middle, y], strict=True)
    moves = [ir.node("Reshape", [before, size.outputs[0]], outputs=[after]) for before, size, after in places]
    graph = ir.Graph([x], [y], nodes=[*sizes, *moves], opset_imports={"": 24})
    skip_reshapes(graph)
    assert moves[1].inputs[0] is middle


@pytest.mark.parametrize("threshold", [20, 5])
def test_softplus(threshold):
    x = torch.cat([torch.linspace(-30, 30, 241), torch.tensor([-1e4, -100.0, 100.0, 1e4])]).expand(2, -1).contiguous()
    operators, y = rewritten(lambda x: F.softplus(x, threshold=threshold), x)
    assert operators["Where"] == (threshold < 20)
    torch.testing.assert_close(y.double(), F.softplus(x.double(), threshold=threshold), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_norms_without_weights(width):
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    x[0, :2] *= torch.tensor([[1e-4], [0.0]])
    for function, exact in (
        (lambda x: normed(x, 1e-6), lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()),
        (lambda x: F.rms_norm(x, x.shape[-1:], None, 1e-6), lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()),
    ):
        operators, y = rewritten(function, x)
        assert set(operators) == {"RMSNormalization", "Constant"}
        torch.testing.assert_close(y.double(), exact(x.double()), rtol=2e-6, atol=1e-9)


def test_products_of_one_input_are_found():
    """`c` multiplies another input, or none, in the second graph; `e` is looked up, and `f` has a bias."""

    def graph(products):
        inputs = {name: ir.val(name, ir.DataType.FLOAT, [1, 4]) for name in "xy"}
        weights = {name: ir.val(PARAMETER + name, ir.DataType.FLOAT, [4, 4]) for name in "abcdef"}
        nodes = []
        for name, source in products.items():
            transposed = ir.node("Transpose", [weights[name]], {"perm": [1, 0]})
            operator = {"e": "Gather", "f": "Gemm"}.get(name, "MatMul")
            read = weights[name] if operator == "Gather" else transposed.outputs[0]
            nodes += [transposed, ir.node(operator, [inputs[source], read])]
        return ir.Model(ir.Graph(list(inputs.values()), [], nodes=nodes, initializers=list(weights.values())), ir_version=10)

    models = [graph({"a": "x", "b": "x", "c": "x", "d": "y", "e": "x", "f": "x"}), graph({"a": "y", "b": "y", "c": "x"}), graph({})]
    assert of_one_input(models, "abcdef") == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    assert of_one_input(models[2:], "ab") == [["a"], ["b"]]  # no graph uses them
    models[1] = graph({"a": "y", "b": "y", "c": "y"})
    assert of_one_input(models, "abcdef") == [["a", "b", "c"], ["d"], ["e"], ["f"]]
    models[1] = graph({"a": "y", "b": "y"})
    assert of_one_input(models, "abcdef") == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


@torch.no_grad()
@pytest.mark.parametrize(("layers", "precision"), [("jet attn", torch.float32), ("attn gdn", torch.float16)])
def test_a_bundle_of_integers_sleeps(layers, precision, tmp_path):
    """In a Loop, where one of the products of an input is read before the others; and in float16, activations rounded."""
    model = zoo.create("gdn4-sleep2-hard8", layers=layers, d_model=64, vocab_size=50)
    export(model.to(precision), tmp_path / "bundle", plan=Plan(dialect="ort", weights="int8"), verified=False)
    exported, ids = ExportedModel(tmp_path / "bundle"), torch.arange(8)[None]
    slept, wanted = (each.consolidate(ids, each.init_state()) for each in (exported, model.float()))
    for fast, exact in zip(slept.fast, wanted.fast, strict=True):
        if exact is not None:
            assert (fast - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_joint_products_compute_the_same(weights, tmp_path, monkeypatch):
    """Rounding happens in groups of inputs, so joining outputs changes nothing."""
    model = zoo.create("gdn4-sleep2-hard8", layers="attn gdn", d_model=64, vocab_size=50)
    logits, products = [], []
    for name in ("joint", "alone"):
        if name == "alone":
            monkeypatch.setattr("zoo.export.quantise.of_one_input", lambda models, names: [(name,) for name in names])
        export(model, tmp_path / name, plan=Plan(dialect="ort", weights=weights), verified=False)
        nodes = [node for graph in graphs_in(onnx.load(tmp_path / name / "prediction.onnx").graph) for node in graph.node]
        products.append(Counter(node.op_type for node in nodes)["MatMulNBits"])
        logits.append(zoo.Session(ExportedModel(tmp_path / name)).feed(torch.arange(30)[None]))
    assert products == [2 + 3 + 2 * 2 + 1, 4 + 7 + 2 * 3 + 1]  # a sleep leaves out what only its last output would need
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)

"""Graphs beyond our own runtime: onnx's reference evaluator, and hosts that fix dimensions by name."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.export.conftest import graphs_in

B = 2
PORTABLE = ["hard", "sliding", "per-pass", "scan"]


class LinearAttention(OpRun):
    """The linear attention of com.microsoft, one token at a time. q, k: [B, T, H * K]. v: [B, T, H * V]. state: [B, H, K, V]."""

    op_domain = "com.microsoft"

    def _run(self, q, k, v, state, decay, beta=None, q_num_heads=None, update_rule=None, scale=None, **_):
        q, k, v = (x.reshape(*x.shape[:2], q_num_heads, -1) for x in (q, k, v))
        outputs = []
        for t in range(q.shape[1]):
            state = state * np.exp(decay[:, t])[..., None, None]
            value = v[:, t]
            if update_rule == "gated_delta":
                value = beta[:, t][..., None] * (value - np.einsum("bhk,bhkv->bhv", k[:, t], state))
            state = state + k[:, t][..., None] * value[..., None, :]
            outputs.append(scale * np.einsum("bhk,bhkv->bhv", q[:, t], state))
        return np.stack(outputs, axis=1).reshape(*q.shape[:2], -1).astype(np.float32), state.astype(np.float32)


class CausalConvWithState(OpRun):
    """The short convolution of com.microsoft. x: [B, C, T]. weight: [C, 1, K]. tail: [B, C, K - 1]."""

    op_domain = "com.microsoft"

    def _run(self, x, weight, bias, tail, activation=None, **_):
        x = np.concatenate([tail, x], axis=2)
        taps = weight.shape[2]
        y = sum(weight[:, 0, i, None] * x[:, :, i : x.shape[2] - taps + 1 + i] for i in range(taps))
        y = y if bias is None else y + bias[:, None]
        return (y / (1 + np.exp(-y)) if activation == "silu" else y).astype(np.float32), x[:, :, x.shape[2] - taps + 1 :]


class GroupQueryAttention(OpRun):
    """The attention of com.microsoft for one token. q: [B, 1, H * D]. k, v: [B, 1, Hkv * D]. keys, values: [B, Hkv, L, D]."""

    op_domain = "com.microsoft"

    def _run(self, q, k, v, keys, values, before, slots, num_heads=None, kv_num_heads=None, scale=None, local_window_size=None, **_):
        assert slots == keys.shape[2]
        outputs, rings = [], [np.zeros_like(keys), np.zeros_like(values)]
        for b, n in enumerate(before):
            for ring, old, new in zip(rings, (keys, values), (k, v), strict=True):
                ring[b, :, :n], ring[b, :, n] = old[b, :, :n], new[b].reshape(kv_num_heads, -1)
            seen = slice(0 if local_window_size < 0 else max(0, n + 1 - local_window_size), n + 1)
            heads = q[b].reshape(kv_num_heads, num_heads // kv_num_heads, -1)
            weights = np.exp(scale * heads @ rings[0][b, :, seen].swapaxes(1, 2))
            outputs.append((weights / weights.sum(-1, keepdims=True)) @ rings[1][b, :, seen])
        return np.stack(outputs).reshape(q.shape).astype(np.float32), *rings


def manifest(folder):
    return json.loads((folder / "bundle.json").read_text())


def feeds(bundled, name):
    """Return random inputs of a graph: padded tokens, in the middle of a stream if windows do not restart, and random states.

    The streams of a token are at different positions.
    """
    rng = np.random.default_rng(0)
    length = next((spec["shape"][1] for spec in bundled["graphs"][name]["inputs"] if spec["name"] in ("input_ids", "h")), 1)
    scalars = {"n_valid": max(1, length - 1), "position": 0 if bundled["evict"] == "hard" else 7, "pass": 1}
    made = {}
    for spec in bundled["graphs"][name]["inputs"]:
        shape = [B if size == "batch" else size for size in spec["shape"]]
        if spec["name"] in scalars:
            made[spec["name"]] = np.asarray(scalars[spec["name"]] + np.arange(B if shape else 1).reshape(shape))
        elif spec["name"] == "position_ids":
            made[spec["name"]] = np.zeros(shape, np.int64) + np.arange(B)[:, None]
        elif spec["dtype"] == "int64":
            made[spec["name"]] = rng.integers(0, bundled["config"]["vocab_size"], shape)
        else:
            made[spec["name"]] = rng.standard_normal(shape, dtype=np.float32)
    return made


def session(file, **fixed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, size in fixed.items():
        options.add_free_dimension_override_by_name(name, size)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", [*PORTABLE, "ort", "ort-full"])
def test_the_reference_evaluator_computes_the_same(bundles, case):
    folder = bundles(case).folder
    bundled = manifest(folder)
    for name in bundled["graphs"]:
        given = feeds(bundled, name)
        wanted = session(folder / name).run(None, given)
        operators = [LinearAttention, CausalConvWithState, GroupQueryAttention]
        found = ReferenceEvaluator(str(folder / name), new_ops=operators).run(None, given)
        for spec, a, b in zip(bundled["graphs"][name]["outputs"], found, wanted, strict=True):
            assert np.abs(a - b).max() <= 1e-4 * max(1, np.abs(b).max()), f"{name}: {spec['name']}"


@pytest.mark.parametrize("case", [*PORTABLE, "ort"])
def test_every_loop_has_a_condition(bundles, case):
    """The initial condition and the one that the body returns are the constant true."""
    loops = 0
    for file in bundles(case).folder.glob("*.onnx"):
        for graph in graphs_in(onnx.load(file, load_external_data=False).graph):
            for loop in (node for node in graph.node if node.op_type == "Loop"):
                body = loop.attribute[0].g
                for where, value in ((graph, loop.input[1]), (body, body.output[0].name)):
                    constant = next(node for node in where.node if value in node.output)
                    assert constant.op_type == "Constant"
                    assert onnx.numpy_helper.to_array(constant.attribute[0].t) == np.array(True)
                loops += 1
    assert loops == (case != "per-pass")


@pytest.mark.parametrize("case", [*PORTABLE, "ort"])
def test_the_free_dimension_is_named_batch(bundles, case):
    folder = bundles(case).folder
    bundled = manifest(folder)["graphs"]
    for name, spec in bundled.items():
        graph = onnx.load(folder / name, load_external_data=False).graph
        for side, values in (("inputs", graph.input), ("outputs", graph.output)):
            shapes = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
            assert shapes == {tensor["name"]: tensor["shape"] for tensor in spec[side]}
            assert {size for shape in shapes.values() for size in shape if isinstance(size, str)} == {"batch"}


@pytest.mark.parametrize("case", [*PORTABLE, "ort"])
def test_a_fixed_batch_leaves_no_input_free(bundles, case):
    folder = bundles(case).folder
    bundled = manifest(folder)
    for name in bundled["graphs"]:
        fixed, given = session(folder / name, batch=B), feeds(bundled, name)
        for value in fixed.get_inputs():
            assert all(isinstance(size, int) for size in value.shape), f"{name}: {value.name} {value.shape}"
        for a, b in zip(fixed.run(None, given), session(folder / name).run(None, given), strict=True):
            assert np.allclose(a, b, atol=1e-5)

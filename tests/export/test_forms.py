"""Other forms of a bundle: integer weights, onnxruntime-genai, long windows; and its generated page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import zoo
from zoo.export import graphs
from zoo.export.bundle import write_onnx
from zoo.export.manifest import Bundle
from zoo.export.page import page
from zoo.export.plan import Plan
from zoo.export.quantise import linear_weights, quantised
from zoo.export.trace import trace


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_integers_are_the_nearest(how):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    stored = quantised(weight, how)
    step = stored.scale[:, None] if how == "int8" else stored.scale.repeat_interleave(32, dim=1)
    assert ((stored.dequantised() - weight).abs() <= step / 2 + 1e-6).all()
    assert stored.integers.abs().max() == (127 if how == "int8" else 7)


@pytest.mark.parametrize(("case", "stored_as"), [("int8", "INT8"), ("int4", "INT4")])
def test_fewer_bits(bundles, case, stored_as):
    model, folder, parity = bundles(case)
    how, difference, agreement = parity.loss
    assert how == case
    assert 0 < difference.mean <= difference.maximum
    assert 0 <= agreement <= 1
    assert how in parity.table().caption
    stored = {tensor.name: tensor for tensor in onnx.load(folder / "prediction.onnx", load_external_data=False).graph.initializer}
    for weight in linear_weights(model):
        assert weight not in stored
        assert stored[f"{weight}_integers"].data_type == onnx.TensorProto.DataType.Value(stored_as)
    assert (folder / "weights.bin").stat().st_size < sum(tensor.nbytes for tensor in model.parameters())


def test_genai_generates_the_same(bundles):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model, folder, _ = bundles("ort")
    prompt = [3, 1, 4, 1]
    ours = [int(token) for token in zoo.Session(model).generate(torch.tensor([prompt]), model.config.window - len(prompt))]
    loaded = genai.Model(str(folder))
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=model.config.window)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)]
    end = model.config.vocab_size - 1  # the end-of-stream id of the config
    wanted = ours[: ours.index(end)] if end in ours else ours
    assert theirs[: len(prompt) + len(wanted)] == prompt + wanted
    assert len(wanted) >= 4


def test_the_page_is_not_stale(tmp_path, monkeypatch):
    """Graphs whose blocks and loop are still placeholders have the same inputs and outputs."""
    monkeypatch.setattr(graphs, "build", lambda graph, dialect: trace(graph, graph.example(), {}))
    bundle = write_onnx(zoo.create("gdn4-sleep4"), tmp_path, Plan(prefill=8))
    written = Path(__file__).parents[2] / "docs" / "deploy.md"
    assert written.read_text(encoding="utf-8") == page(bundle)


@pytest.mark.parametrize("case", ["per-pass", "sliding", "full", "ort"])
def test_a_page_names_every_tensor(bundles, case):
    _, folder, _ = bundles(case)
    bundle = Bundle.read(folder)
    text = page(bundle)
    for file, spec in bundle.graphs.items():
        assert f"## {file}" in text
        assert all(f"`{tensor.name}`" in text for tensor in (*spec.inputs, *spec.outputs))

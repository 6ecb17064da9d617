"""Other forms of a bundle: integer weights, onnxruntime-genai, long windows; and its generated page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import zoo
from tests.export.conftest import graphs_in
from zoo.export import assembly
from zoo.export.bundle import export, write_onnx
from zoo.export.genai import genai_config
from zoo.export.manifest import Bundle
from zoo.export.page import page
from zoo.export.plan import Plan
from zoo.export.quantise import linear_weights, quantised, rounded
from zoo.export.runtime import ExportedModel, session_options
from zoo.export.trace import trace
from zoo.export.verify import stream


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_the_nearest(bits):
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0
    stored = quantised(weight, bits)
    step = stored.scale.abs().repeat_interleave(32, dim=1)[:, :70]
    # in 4 bits, what lies opposite to the value of largest magnitude may exceed 7 steps
    reach = step / 2 if bits == 8 else torch.where(weight / stored.scale.repeat_interleave(32, dim=1)[:, :70] > 7.5, step, step / 2)
    assert ((stored.dequantised() - weight).abs() <= reach + 1e-6).all()
    assert stored.integers.min() == (-127 if bits == 8 else -8)
    assert stored.integers.max() == (127 if bits == 8 else 7)


def test_the_full_range_of_4_bits_is_closer():
    """A scale of the signed extreme over -8 has a smaller error than that of the magnitude over 7."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    steps = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 7
    narrow = ((weight.unflatten(1, (-1, 32)) / steps).round() * steps).flatten(1)
    assert (quantised(weight, 4).dequantised() - weight).norm() < 0.97 * (narrow - weight).norm()


def test_half_precision_scales():
    tiny = torch.full((2, 32), 1e-7, dtype=torch.float16)
    assert quantised(tiny, 4).dequantised().isfinite().all()


INTEGER = ["int8", "int4", "exact", "ort-int8", "ort-int4"]


def whole(name):
    """Name of a stored tensor of which several uses have initializers of their own."""
    return re.sub(r"_\d+$", "", name)


def joined(name):
    """Names of the weights whose integers are stored together."""
    return set(whole(name).removesuffix("_integers").split("+"))


@pytest.mark.parametrize("case", INTEGER)
def test_integers_stand_next_to_their_products(bundles, case):
    """No weight is stored as floats, or more than once, and nothing stands between integers and product."""
    model, folder, _ = bundles(case)
    plan, places = Bundle.read(folder).plan, {}
    for file in ("prediction.onnx", "consolidation.onnx"):
        multiplied = set()
        for graph in graphs_in(onnx.load(folder / file, load_external_data=False).graph):
            stored = {tensor.name: tensor for tensor in graph.initializer}
            for name, tensor in stored.items():
                if tensor.data_location == tensor.EXTERNAL:
                    places.setdefault(whole(name), set()).add(str(tensor.external_data))
            for node in graph.node:
                if node.op_type == "MatMulNBits":
                    attributes = {attribute.name: attribute.i for attribute in node.attribute}
                    assert (attributes["bits"], attributes["accuracy_level"]) == (plan.bits, 4)
                    multiplied |= joined(node.input[1])
                readers = [reader for reader in graph.node if set(node.output) & set(reader.input)]
                if node.op_type == "DequantizeLinear" and node.input[0] in stored:
                    assert len(readers) == 1
                    assert readers[0].op_type in ("MatMul", "Gemm")
                    multiplied |= joined(node.input[0])
        wanted, heads = linear_weights(model).keys(), {"embed.weight", "head.weight"}
        assert multiplied - heads == wanted - heads
        assert multiplied & heads == (wanted & heads if file == "prediction.onnx" else set())
    assert all(len(found) == 1 for found in places.values())
    assert not places.keys() & linear_weights(model).keys()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
@pytest.mark.parametrize("dialect", ["portable", "ort"])
def test_a_tied_table_is_not_held_twice(dialect, tmp_path):
    """onnxruntime packs it for the head and keeps the pages that it read as long as another node reads the same initializer."""
    model = zoo.create("gdn4-sleep1-hard16", layers="gdn", d_model=64, vocab_size=16_000, tie_embeddings=True)
    export(model, tmp_path / "bundle", plan=Plan(dialect=dialect), verified=False)
    opened = ExportedModel(tmp_path / "bundle")
    mapped = re.findall(r"weights\.bin\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert mapped  # the rows that are looked up
    assert 1024 * sum(map(int, mapped)) < model.embed.weight.nbytes / 4
    assert opened(torch.tensor([[3]]), opened.init_state()).logits.isfinite().all()


@pytest.mark.parametrize("case", INTEGER)
def test_onnxruntime_fuses_every_product(bundles, case, tmp_path):
    """In the Loop too; only exact products with 8 bits are computed from weights that are dequantised when the graph is opened."""
    model, folder, _ = bundles(case)
    bundle = Bundle.read(folder)
    for file in ("prediction.onnx", "consolidation.onnx"):
        options = session_options(bundle, folder / file)
        options.optimized_model_filepath = str(tmp_path / file)
        onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        written, optimised = (
            [node for graph in graphs_in(onnx.load(where / file, load_external_data=False).graph) for node in graph.node]
            for where in (folder, tmp_path)
        )
        products = [node for node in written if node.op_type in ("DequantizeLinear", "MatMulNBits") and "Gather" not in node.name]
        integers = set().union(*(joined(node.input[node.op_type == "MatMulNBits"]) for node in products))
        assert len(integers) >= len(linear_weights(model)) - (file != "prediction.onnx")
        fused = [node for node in optimised if node.op_type == "MatMulNBits"]
        assert len(fused) == (0 if case == "exact" else len(products))
        assert not [node for node in optimised if node.op_type == "DequantizeLinear" and "Gather" not in node.name]


@torch.no_grad()
def divergence(model, other, ids):
    """KL divergence of another model's predictions over a stream with a sleep after each window, in float64."""
    logits = []
    for each in (model, other):
        each = copy.deepcopy(each).double()
        state, read = each.init_state(len(ids)), []
        for chunk in ids.split(model.config.window, dim=1):
            read.append(each(chunk, state).logits.log_softmax(-1))
            state = each.consolidate(chunk, state)
        logits.append(torch.cat(read, dim=1))
    truth, found = logits
    return ((truth - found) * truth.exp()).sum(-1).mean().item()


@pytest.mark.parametrize("case", INTEGER)
def test_the_error_of_integers_is_reported(bundles, case):
    """Activations are rounded to 8 bits unless a bundle is exact."""
    model, folder, parity = bundles(case)
    assert parity.loss.stored == ("int8 weights, exact activations" if case == "exact" else f"{case[-4:]} weights, int8 activations")
    assert 0 < parity.loss.difference.mean <= parity.loss.difference.maximum
    expected = divergence(model, rounded(model, 4 if "int4" in case else 8), stream(model, Bundle.read(folder).window))
    assert 0.5 * expected < parity.loss.divergence < 3 * expected  # activations are rounded, too
    assert str(parity.loss) in parity.table().caption
    ids = torch.arange(12).view(2, 6) % 11
    rounding, exact = (ExportedModel(folder, exact_activations=flag) for flag in (False, True))
    a, b = (exported(ids, exported.init_state(2)).logits for exported in (rounding, exact))
    assert (a - b).norm() < 0.04 * b.norm()
    assert torch.equal(a, b) == (case == "exact")


@pytest.mark.parametrize(
    ("upstream", "ends"),
    [({}, [10]), ({"eos_token_id": None}, [10]), ({"eos_token_id": 3}, [3]), ({"text_config": {"eos_token_id": [4, 5]}}, [4, 5])],
)
def test_end_tokens_for_genai(upstream, ends):
    config = zoo.create("gdn4", vocab_size=11, device="meta").config.model_copy(update={"upstream": upstream})
    assert json.loads(genai_config(config, 64, {}))["model"]["eos_token_id"] == ends
    for stored, first in {b'{"eos_token_id": 7}': [7], b'{"eos_token_id": 11}': ends, b"[]": ends}.items():
        assert json.loads(genai_config(config, 64, {"generation_config.json": stored}))["model"]["eos_token_id"] == first
    with pytest.raises(zoo.ZooError, match=r"^generation_config\.json: damaged"):
        genai_config(config, 64, {"generation_config.json": b"{"})


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
    monkeypatch.setattr(assembly, "build", lambda graph, dialect: trace(graph, graph.example(), {}))
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

"""The contents of a bundle, and the errors of an export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import AttributeProto

import zoo
from zoo.errors import ZooError
from zoo.export import bundle as making
from zoo.export.cli import main
from zoo.export.manifest import Bundle
from zoo.export.plan import Plan
from zoo.export.runtime import ExportedModel, session_options

FILES = ["bundle.json", "consolidation.onnx", "prediction.onnx", "weights.bin"]


def nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def load(bundle, file):
    return onnx.load(bundle.folder / file, load_external_data=False)


@pytest.mark.parametrize("file", ["prediction.onnx", "consolidation.onnx"])
def test_standard_operators_without_traces(bundle, file):
    onnx.checker.check_model(str(bundle.folder / file), full_check=True)
    model = load(bundle, file)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert not model.functions
    assert not model.metadata_props
    assert not model.graph.metadata_props
    for node in nodes(model.graph):
        assert node.domain == ""
        assert not node.metadata_props
        assert not node.doc_string
    loops = [node for node in nodes(model.graph) if node.op_type in ("Loop", "Scan", "If")]
    assert len(loops) == (file == "consolidation.onnx")
    # TensorRT reads TensorScatter in linear mode only
    assert not any(
        attribute.name == "mode" for node in nodes(model.graph) if node.op_type == "TensorScatter" for attribute in node.attribute
    )
    assert ("TensorScatter" in {node.op_type for node in nodes(model.graph)}) == (file == "prediction.onnx")
    names = [node.name for node in nodes(model.graph)]
    assert len(set(names)) == len(names)
    assert {f"blocks.{i}" for i in range(len(bundle.model.blocks))} <= {part for name in names for part in name.split("/")}


def test_the_span_is_one_loop_of_constant_length(bundle):
    graph = load(bundle, "consolidation.onnx").graph
    loop = next(node for node in graph.node if node.op_type == "Loop")
    constants = {node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"}
    apart = bundle.folder.name == "hard"  # nothing reads the last MLP of the last pass, which therefore follows the Loop
    assert constants[loop.input[0]] == bundle.model.config.loops - apart
    assert constants[loop.input[1]]
    body = loop.attribute[0].g
    assert not body.initializer
    assert onnx.numpy_helper.to_array(next(node for node in body.node if node.output[0] == body.output[0].name).attribute[0].t)


def test_size_does_not_depend_on_loops(bundles, tmp_path):
    model, folder, _ = bundles("hard")
    more = zoo.create(model.config, device="meta", loops=model.config.loops + 4)
    more.load_state_dict(model.state_dict(), assign=True)
    making.write_onnx(more, tmp_path, Plan(prefill=None))
    few, many = (onnx.load(where / "consolidation.onnx", load_external_data=False) for where in (folder, tmp_path))
    assert len(list(nodes(few.graph))) == len(list(nodes(many.graph)))
    assert few.ByteSize() == many.ByteSize()
    assert few != many


@pytest.mark.parametrize("case", ["hard", "late"])
def test_dead_blocks_of_the_last_pass_are_not_there(bundles, case):
    """After the Loop, the last pass ends with the mixer of the last block that has fast weights."""
    _, folder, _ = bundles(case)
    graph = onnx.load(folder / "consolidation.onnx", load_external_data=False).graph
    inside = {node.name for node in next(node for node in graph.node if node.op_type == "Loop").attribute[0].g.node}
    last = {node.name for node in graph.node if node.name.startswith("blocks.")}
    assert any("mlp/down_proj" in name for name in inside)
    assert any(name.startswith("blocks.1/mixer/k_proj") for name in last)
    assert not any(name.startswith(("blocks.1/mlp", "blocks.1/mixer/o_proj", "blocks.2")) for name in last)


def test_a_piece_returns_the_logits_of_its_last_token(bundles):
    """The head of the others is a graph of its own, which is opened when a caller asks for their logits."""
    _, folder, _ = bundles("sliding")
    manifest = json.loads((folder / "bundle.json").read_text())["graphs"]
    outputs = {file: {tensor["name"]: tensor["shape"] for tensor in spec["outputs"]} for file, spec in manifest.items()}
    assert outputs["prefill.onnx"]["logits"] == ["batch", 1, 11]
    assert outputs["prefill.onnx"]["hidden"] == ["batch", 4, 16]
    assert outputs["head.onnx"] == {"logits": ["batch", 4, 11]}
    exported = ExportedModel(folder)
    ids = torch.arange(10)[None] % 11
    for kept in (0, 1):
        assert exported(ids, exported.init_state(), logits_to_keep=kept).logits.shape == (1, kept, 11)
    assert "_head" not in vars(exported)
    wanted = exported(ids, exported.init_state()).logits
    for kept in (1, 2, 3, 7):
        found = exported(ids, exported.init_state(), logits_to_keep=kept).logits
        torch.testing.assert_close(found, wanted[:, -kept:], rtol=0, atol=1e-5)


def test_every_parameter_is_stored_once(bundle):
    parameters = dict(bundle.model.named_parameters())
    linear = {f"{name}.weight" for name, module in bundle.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert (bundle.folder / "weights.bin").stat().st_size == sum(4 * tensor.numel() for tensor in parameters.values())
    places = {}
    for file in ("prediction.onnx", "consolidation.onnx"):
        for tensor in load(bundle, file).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                assert place["location"] == "weights.bin"
                name = tensor.name.removesuffix("_1")  # the products of a table in which rows are looked up
                assert places.setdefault(name, place) == place
                stored = onnx.numpy_helper.to_array(tensor, str(bundle.folder))
                layout = parameters[name].T if name in linear else parameters[name]
                assert torch.equal(torch.tensor(stored), layout)
            else:
                assert tensor.ByteSize() < 4096
    assert places.keys() == parameters.keys()


def test_names_and_shapes(bundles):
    model, folder, _ = bundles("sliding")
    manifest = json.loads((folder / "bundle.json").read_text())
    assert (manifest["window"], manifest["loops"], manifest["evict"], manifest["opset"], manifest["precision"]) == (
        5,
        3,
        "sliding",
        24,
        "float32",
    )
    assert zoo.create(manifest["config"], device="meta").config == model.config
    prediction, consolidation = manifest["graphs"]["prediction.onnx"], manifest["graphs"]["consolidation.onnx"]
    given = {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in prediction["inputs"]}
    assert given["input_ids"] == ("int64", ["batch", 1])
    assert given["position"] == ("int64", ["batch"])
    assert given["past_key_values.3.key"] == ("float32", ["batch", 1, 5, 8])
    assert given["past_key_values.0.recurrent_state"] == ("float32", ["batch", 2, 8, 16])
    assert given["past_key_values.2.conv_state"] == ("float32", ["batch", 64, 3])
    states = [name for name in given if name.startswith("past_key_values.")]
    assert len(states) == 8
    assert [tensor["name"] for tensor in consolidation["inputs"]] == ["input_ids", "n_valid", "position", *states]
    assert consolidation["inputs"][2]["shape"] == []
    present = [name.replace("past_key_values", "present") for name in states]
    assert [tensor["name"] for tensor in prediction["outputs"]] == ["logits", *present]
    assert [tensor["name"] for tensor in consolidation["outputs"]] == present


def test_a_window_that_restarts_is_not_read_asleep(bundles):
    """A host may pass its states unchanged: the contents of the window have no effect, and come out as zeros."""
    folder = bundles("hard").folder
    session = onnxruntime.InferenceSession(str(folder / "consolidation.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    assert names[:2] == ["input_ids", "n_valid"]
    assert sorted(name.rsplit(".", 1)[1] for name in names[2:]) == ["conv_state", "key", "recurrent_state", "value"]
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(0, 11, (2, 6)), "n_valid": np.array(5)}
    for value in session.get_inputs()[2:]:
        feeds[value.name] = rng.standard_normal([2, *value.shape[1:]], dtype=np.float32)
    outputs = [value.name for value in session.get_outputs()]
    dirty = dict(zip(outputs, session.run(None, feeds), strict=True))
    clean = dict(
        zip(outputs, session.run(None, {n: x if "." not in n or "recurrent" in n else 0 * x for n, x in feeds.items()}), strict=True)
    )
    for name in outputs:
        assert np.array_equal(dirty[name], clean[name])
        assert ("recurrent" in name) == bool(dirty[name].any())


def test_graphs_disturb_no_other_sessions(bundles):
    """Threads of a graph that rests do not spin, and other code of the process may open sessions of its own."""
    folder = bundles("hard").folder
    bundle = ExportedModel(folder).bundle
    options = [session_options(bundle, folder / file) for file in bundle.graphs]
    assert all(each.get_session_config_entry("session.force_spinning_stop") == "1" for each in options)
    onnxruntime.InferenceSession(str(folder / "prediction.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("room", [0, 1])
def test_large_weights_are_packed_once_and_small_ones_for_every_graph(bundles, monkeypatch, room):
    folder = bundles("hard").folder
    bundle = ExportedModel(folder).bundle
    monkeypatch.setattr("zoo.export.runtime.SMALL", (folder / "weights.bin").stat().st_size - 1 + room)
    for file in bundle.graphs:
        options = session_options(bundle, folder / file)
        if room or file == "prediction.onnx":
            with pytest.raises(RuntimeError, match="does not have configuration"):
                options.get_session_config_entry("session.disable_prepacking")
        else:
            assert options.get_session_config_entry("session.disable_prepacking") == "1"


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_is_refused(bundles, tmp_path, file):
    folder = shutil.copytree(bundles("hard").folder, tmp_path / "bundle")
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 255
    (folder / file).write_bytes(content)
    with pytest.raises(ZooError, match=file) as caught:
        zoo.export.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", FILES[1:])
def test_a_file_of_another_bundle_is_refused(bundles, tmp_path, file):
    folder = shutil.copytree(bundles("hard").folder, tmp_path / "bundle")
    shutil.copy(bundles("once").folder / file, folder / file)
    with pytest.raises(ZooError, match=file):
        zoo.export.load(folder)
    (folder / file).unlink()
    with pytest.raises(ZooError, match=f"{file}: is missing"):
        zoo.export.load(folder)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no bundle.json here"), ("{", "not JSON"), ("[]", "want a mapping"), ("{}", "config: is missing")]
)
def test_a_broken_manifest(tmp_path, content, message):
    if content is not None:
        (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(ZooError, match=message):
        zoo.export.load(tmp_path)


def test_another_format_is_refused(bundles, tmp_path):
    folder = shutil.copytree(bundles("hard").folder, tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ZooError, match=r"bundle.json: format: 1; want 3: export the model again"):
        zoo.export.load(folder)


def copy_of(folder):
    """Return a stand-in for `write_onnx` that copies the files of an existing bundle."""

    def write(model, out, *_):
        shutil.copytree(folder, out, dirs_exist_ok=True)
        return Bundle.read(out)

    return write


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gdn4-sleep2", "--target", "nonsense"], "unknown export target 'nonsense'; "),
        (["gdn4"], "evict: 'none' does not bound the window.* allowed: hard, sliding, or a --max-length"),
        (["gdn4-sleep2", "--max-length", "9"], "--max-length: 9; windows of gdn4-sleep2 hold 24 tokens"),
        (["gdn4", "--max-length", "9", "--per-pass"], "never sleeps"),
        (["gdn4-sleep2", "--prefill", "25"], "prefill: 25 tokens are more than a window of 24"),
        (["gdn4-sleep2", "--prefill", "1"], "--prefill: 1; want 0, or at least 2"),
        (["gdn4-sleep2", "--loops", "4", "loops=3"], "--loops: 4; loops=3 sets it too; want one of them"),
        (["gdn4-sleep2", "--batch", "1", "2", "3"], "--batch: is not an option of target onnx"),
        (["gdn4-sleep2", "--timing-cache", "x"], "--timing-cache: is not an option of target onnx"),
        (["gdn4-sleep2", "--loops", "0"], "loops: 0: .* greater than or equal to 1"),
        (["gdn4-sleep2", "carry=false"], "carry: False is not supported"),
        (["gdn4-sleep2", "feed_back=false"], "feed_back: False is not supported"),
        (["gdn5-sleep2"], "unknown model 'gdn5-sleep2'; did you mean 'gdn4'?"),
        (["gdn4-sleep2", "loops"], "want field=value"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    result = run(*arguments, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("window", "prefill"), [(4096, 128), (24, 24), (1, None)])
def test_pieces_of_a_prompt_fit_into_a_window(window, prefill):
    assert Plan().cut(window).prefill == prefill


def test_a_seed_needs_a_name(tmp_path):
    result = run(tmp_path, "--seed", "4", "--out", tmp_path / "new")
    assert (result.exit_code, result.stderr) == (2, f"Error: --seed: 4; the weights are those of {tmp_path}\n")


def test_an_existing_folder_is_untouched(tmp_path):
    (tmp_path / "mine").write_text("untouched")
    result = run("gdn4-sleep2", "--out", tmp_path)
    assert result.exit_code == 2
    assert "already exists" in result.stderr
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("mine", "untouched")]


def test_graphs_that_differ_leave_nothing(bundles, tmp_path, monkeypatch):
    model, folder, _ = bundles("hard")

    monkeypatch.setattr(making, "write_onnx", copy_of(folder))
    making.export(model, tmp_path / "same")
    with pytest.raises(ZooError, match="from PyTorch"):
        making.export(zoo.create(model.config, seed=1), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_precisions_and_devices(bundles, tmp_path):
    config = bundles("hard").model.config
    with pytest.raises(ZooError, match=r"embed.weight is torch.float64; allowed: float32, float16, bfloat16"):
        zoo.export.export(zoo.create(config, dtype=torch.float64), tmp_path / "new")
    with pytest.raises(ZooError, match="weights are on meta; allowed: cpu"):
        zoo.export.export(zoo.create(config, device="meta"), tmp_path / "new")
    assert not list(tmp_path.iterdir())


class Growing(NamedTuple):
    tokens: torch.Tensor


def test_models_that_no_graph_can_hold(bundles, tmp_path):
    model = zoo.create(bundles("hard").model.config)
    model.blocks[1].mixer.new_window = lambda batch: Growing(torch.zeros(batch, 0, 4))
    with pytest.raises(ZooError, match="block 'gdn' keeps a growing cache, which no graph can hold; allowed: KV, or a fixed size"):
        zoo.export.export(model, tmp_path / "new")
    model.config = model.config.model_copy(update={"evict": "oldest"})
    with pytest.raises(ZooError, match="evict: graphs do not support 'oldest'; allowed: none, hard, sliding"):
        zoo.export.export(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_no_space(bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ZooError, match="has 1 left"):
        zoo.export.export(bundles("hard").model, tmp_path / "new")


def test_a_saved_model_against_its_bundle(bundles, tmp_path):
    model, folder, _ = bundles("hard")
    zoo.save(model, tmp_path / "run")
    result = run(tmp_path / "run", "--verify-only", folder)
    assert result.exit_code == 0, result.output
    assert "same greedy token 100.00%" in result.output
    result = run(tmp_path / "run", "loops=2", "--verify-only", folder)
    assert result.exit_code == 2
    assert f"{folder}: was exported from a model with loops: 3, not 2" in " ".join(result.stderr.split())
    weights = model.head.weight.clone()
    with torch.no_grad():
        model.head.weight.mul_(-1)
    zoo.save(model, tmp_path / "other")
    with torch.no_grad():
        model.head.weight.copy_(weights)
    result = run(tmp_path / "other", "--verify-only", folder)
    assert result.exit_code == 2
    assert "from PyTorch" in result.stderr
    result = run(tmp_path / "run", "d_model=32", "--verify-only", folder)
    assert "the config wants" in result.stderr
    for option in (["--int8"], ["--no-verify"], ["--dtype", "float16"], ["--prefill", "0"], ["--target", "onnx"]):
        result = run(tmp_path / "run", "--verify-only", folder, *option)
        assert result.exit_code == 2
        assert f"--verify-only compares the bundle as it is, without {option[0]}" in result.stderr


def test_blocks_inserted_into_a_folder_are_exported(tmp_path):
    zoo.save(zoo.create("gdn4", layers="attn", d_model=16, vocab_size=32), tmp_path / "parent")
    fields = "layers=attn gdn", "evict=hard", "window=8", "loops=2"
    result = run(tmp_path / "parent", *fields, "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    assert zoo.export.load(tmp_path / "bundle").model.config.pattern == ("attn", "gdn")


def test_a_folder_in_use_is_found_before_any_work(bundles, tmp_path, monkeypatch):
    model, folder, _ = bundles("hard")
    zoo.save(model, tmp_path / "run")
    monkeypatch.setattr("zoo.checkpoints.own.load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = run(tmp_path / "run", "--out", folder)
    assert result.exit_code == 2
    assert "already exists" in result.stderr


def test_the_command_writes_a_bundle(bundles, tmp_path, monkeypatch):
    model, folder, _ = bundles("hard")
    monkeypatch.setattr(making, "write_onnx", copy_of(folder))
    zoo.save(model, tmp_path / "run")
    result = run(tmp_path / "run", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "same greedy token 100.00%" in result.output
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == FILES
    assert len(list(zoo.export.load(tmp_path / "new").generate(torch.zeros(1, 1, dtype=torch.int64), 3))) == 3


def test_help_needs_no_torch():
    code = "import sys; from zoo.export.cli import main; main(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    assert "RUN_OR_NAME" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("missing", "name"), [("onnxscript", "export"), ("onnxruntime", "load")])
def test_without_the_onnx_packages(missing, name):
    code = f"import sys; sys.modules['{missing}'] = None; import zoo; zoo.export.{name}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip().splitlines()[-1].endswith("ZooError: export: needs pip install 'sleep-zoo[onnx]'")

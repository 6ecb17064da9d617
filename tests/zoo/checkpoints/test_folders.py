"""Upstream folders: shards, pickled files, tied heads; damaged or unsupported ones are refused with file and tensor named."""

import json
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import zoo
from zoo.checkpoints.family import families
from zoo.checkpoints.stored import INDEX
from zoo.cli import main

ORACLES = Path(__file__).parents[2] / "data" / "oracles"


@pytest.fixture
def jet(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ORACLES / "jet-nemotron-a", tmp_path / "jet", ignore=shutil.ignore_patterns("io*", "README*")))


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in fields.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def refuses(folder: Path, *words: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(zoo.ZooError) as caught:
        zoo.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert sorted(folder.rglob("*")) == before


def refusal(folder: Path) -> str:
    """Return the error with which a folder is refused, or nothing."""
    try:
        zoo.load(folder)
    except zoo.ZooError as error:
        return str(error)
    return ""


@torch.no_grad()
def test_shards(jet: Path) -> None:
    ids = torch.arange(9)[None]
    want = zoo.load(jet)(ids).logits
    shard(jet)
    assert torch.equal(zoo.load(jet)(ids).logits, want)


def test_missing_shard(jet: Path) -> None:
    places = shard(jet)
    (jet / places["model.norm.weight"]).unlink()
    refuses(jet, places["model.norm.weight"], "missing")


def test_shard_without_its_tensor(jet: Path) -> None:
    places = shard(jet)
    edit = load_file(jet / places["model.norm.weight"])
    save_file({name: x for name, x in edit.items() if name != "model.norm.weight"}, jet / places["model.norm.weight"])
    refuses(jet, places["model.norm.weight"], "'model.norm.weight' is missing")


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_index_that_points_outside(jet: Path, outside: str) -> None:
    places = shard(jet)
    (jet / INDEX).write_text(json.dumps({"weight_map": {**places, "model.norm.weight": outside}}))
    refuses(jet, INDEX)


def test_index_of_another_form(jet: Path) -> None:
    shard(jet)
    (jet / INDEX).write_text("[]")
    refuses(jet, INDEX, "want an object")
    (jet / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "x" * 300}}))
    refuses(jet, INDEX, "weight_map", "is not a path")
    (jet / INDEX).write_text('{"weight_map": 3}')
    refuses(jet, INDEX, "weight_map")


def test_wrong_shape(jet: Path) -> None:
    edit_tensors(jet, **{"model.layers.0.self_attn.A_log": torch.zeros(4)})
    refuses(jet, "model.safetensors", "model.layers.0.self_attn.A_log", "[4]", "[3]")


def test_missing_and_unexpected_tensors(jet: Path) -> None:
    edit_tensors(jet, **{"model.layers.0.self_attn.A_log": None})
    refuses(jet, "model.layers.0.self_attn.A_log", "missing")
    edit_tensors(jet, **{"model.layers.0.self_attn.A_log": torch.zeros(3), "model.extra": torch.zeros(3)})
    refuses(jet, "model.safetensors", "model.extra", "not part of")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -3])
def test_truncated_file(jet: Path, kept: int) -> None:
    file = jet / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refuses(jet, "model.safetensors", "cannot be read")


def test_corrupt_header(jet: Path) -> None:
    file = jet / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    refuses(jet, "model.safetensors", "cannot be read")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "jet_nemotrom"}, ("model_type", "did you mean 'jet_nemotron'")),
        ({"model_type": ...}, ("model_type", "None")),
        ({"hidden_size": ...}, ("config.json", "hidden_size", "missing")),
        ({"hidden_size": 128}, ("embed_tokens",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
        ({"hidden_size": "wide"}, ("config.json",)),
        ({"layer_types": ["jet"] * 4 + ["mamba"]}, ("layer_types", "'mamba'")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope_type", "'yarn'")),
        ({"num_attention_heads": 5}, ("config.json",)),
        ({"efficient_attention_config": {}}, ("config.json", "swa")),
    ],
)
def test_bad_config(jet: Path, fields: dict, words: tuple[str, ...]) -> None:
    edit_config(jet, **fields)
    refuses(jet, *words)


def test_folder_without_files(tmp_path: Path, jet: Path) -> None:
    refuses(tmp_path / "nothing", "nothing: no such folder")
    (jet / "model.safetensors").unlink()
    refuses(jet, "model.safetensors: cannot be read")
    (jet / "config.json").write_text("{")
    refuses(jet, "config.json", "not JSON")


def test_tied_heads_must_be_equal(jet: Path) -> None:
    embedding = load_file(jet / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(jet, **{"lm_head.weight": embedding.clone()})
    zoo.load(jet)
    edit_tensors(jet, **{"lm_head.weight": embedding + 1})
    refuses(jet, "lm_head.weight", "differs")


@torch.no_grad()
def test_lit_gpt_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ORACLES / "samba-a" / "config.json").read_bytes())
    tensors = load_file(ORACLES / "samba-a" / "model.safetensors")
    torch.save({"model": tensors, "step": 3}, tmp_path / "iter-3-ckpt.pth")
    ids = torch.arange(9)[None]
    assert torch.equal(zoo.load(tmp_path)(ids).logits, zoo.load(ORACLES / "samba-a")(ids).logits)


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes((ORACLES / "samba-a" / "config.json").read_bytes())
    torch.save({"model": Evil()}, tmp_path / "x.pth")
    refuses(tmp_path, "x.pth")
    assert not (tmp_path / "executed").exists()


@torch.no_grad()
def test_samba_of_flash_linear_attention(tmp_path: Path) -> None:
    """The same weights under the names of the other port."""
    samba = zoo.load(ORACLES / "samba-a")
    fields = {**samba.config.model_dump(), "d_ff": 256, "upstream": {"model_type": "samba"}}
    model = zoo.create(fields)
    zoo.save(model, tmp_path / "fla", format="hf")
    names = load_file(tmp_path / "fla" / "model.safetensors").keys()
    assert {"backbone.embeddings.weight", "backbone.layers.0.mixer.x_proj.weight", "backbone.layers.1.mixer.q_proj.weight"} <= names
    ids = torch.arange(20)[None]
    assert torch.equal(zoo.load(tmp_path / "fla")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["gdn-fla-a", "jet-nemotron-a"])
def test_value_heads_of_any_ratio(name: str, tmp_path: Path) -> None:
    """Upstream truncates head_dim * expand_v; 28 * (244 / 28) is less than 244 in floating point."""
    config = zoo.load(ORACLES / name).config
    kind = "gdn" if "gdn" in config.blocks else "jet"
    model = zoo.create(config, blocks={kind: {"head_dim": 28, "expand_v": 244 / 28}})
    zoo.save(model, tmp_path / "x", format="hf")
    assert zoo.load(tmp_path / "x").blocks[0].mixer.value_dim == 244


def test_parent_of_another_architecture() -> None:
    with pytest.raises(zoo.ZooError, match=r"config.json: vocab_size: the checkpoint has 256, jet2b-sleep6 has 151936"):
        zoo.create("jet2b-sleep6", device="meta", pretrained=ORACLES / "jet-nemotron-a")
    parent = zoo.load(ORACLES / "jet-nemotron-a").config
    with pytest.raises(zoo.ZooError, match=r"blocks.swa.window: the checkpoint has 16, jet has 8"):
        zoo.create(parent, name="jet", blocks={"swa": {"window": 8}}, pretrained=ORACLES / "jet-nemotron-a")


@torch.no_grad()
def test_parent_of_a_sleeping_model() -> None:
    folder = ORACLES / "jet-nemotron-a"
    parent = zoo.load(folder)
    model = zoo.create(parent.config, evict="hard", window=8, loops=2, span=(1, 3), inject=True, residual_gates=2, pretrained=folder)
    assert not any(parameter.is_meta for parameter in model.parameters())
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, parent(ids).logits)
    assert model.consolidate(ids).position == 0
    assert (model.inject == 0).all()  # into a trained model, nothing is injected at first
    assert (zoo.create("gdn4-sleep2", inject=True).inject == 1).all()


def test_models_that_upstream_cannot_represent_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(zoo.ZooError, match="its config names no upstream project; format 'zoo' can hold it"):
        zoo.save(zoo.create("gdn4"), tmp_path / "x", format="hf")
    ouro = zoo.load(ORACLES / "ouro-a").config
    jet = {"heads": 2, "head_dim": 16, "mlp": False, "inserted": True}
    with pytest.raises(zoo.ZooError, match=r"layers \[4\] are not part of the upstream model"):
        zoo.save(zoo.create(ouro, layers="attn*4 jet", wake_loops=1, blocks={"jet": jet}), tmp_path / "x", format="hf")
    with pytest.raises(zoo.ZooError, match="has no 'jet'"):
        zoo.save(zoo.create(ouro, layers="attn*4 jet", wake_loops=1, blocks={"jet": {"heads": 2}}), tmp_path / "x", format="hf")
    llama = zoo.load(ORACLES / "llama-swa-a").config
    with pytest.raises(zoo.ZooError, match=r"blocks.attn.rotary: 0.5: upstream has 1.0"):
        zoo.save(zoo.create(llama, blocks={"attn": {"rotary": 0.5}}), tmp_path / "x", format="hf")
    with pytest.raises(zoo.ZooError, match=r"norm: wide: upstream has plain"):
        zoo.save(zoo.create(llama, norm="wide"), tmp_path / "x", format="hf")
    with pytest.raises(zoo.ZooError, match="inject: True is not part"):
        zoo.save(zoo.create(llama, inject=True, loops=2), tmp_path / "x", format="hf")
    with pytest.raises(zoo.ZooError, match="residual_gates: 2 is not part"):
        zoo.save(zoo.create(llama, residual_gates=2, loops=2), tmp_path / "x", format="hf")
    assert not (tmp_path / "x").exists()


@torch.no_grad()
def test_dtype(tmp_path: Path) -> None:
    stored = zoo.load(ORACLES / "mamba2-a").state_dict()
    model = zoo.load(ORACLES / "mamba2-a", dtype=torch.bfloat16)
    zoo.save(model, tmp_path / "x", format="hf")
    for made in (model, zoo.load(tmp_path / "x"), zoo.create(model.config, dtype="bfloat16", pretrained=ORACLES / "mamba2-a")):
        for name, parameter in made.named_parameters():
            wide = name.endswith(("norm.weight", "norm_weight", "A_log", "D", "dt_bias"))
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
            assert torch.equal(parameter, stored[name].to(parameter.dtype)), name
        assert made(torch.arange(9)[None]).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_the_residual_stream_of_mamba_is_float32(tmp_path: Path) -> None:
    """In a bfloat16 model too, as upstream: then it is closer to float32 than with a bfloat16 stream."""
    shutil.copytree(ORACLES / "mamba2-a", tmp_path / "x")
    edit_config(tmp_path / "x", residual_in_fp32=False)
    ids = torch.arange(192).view(8, -1)
    wide, narrow = (zoo.load(folder, dtype=torch.bfloat16) for folder in (ORACLES / "mamba2-a", tmp_path / "x"))
    rounded = zoo.load(ORACLES / "mamba2-a")
    rounded.load_state_dict(wide.state_dict())
    exact = rounded(ids).logits
    assert (wide.residual_dtype, narrow.residual_dtype) == (torch.float32, torch.bfloat16)
    seen = []
    wide.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    errors = [(model(ids).logits - exact).square().mean() for model in (wide, narrow)]
    assert errors[0] < errors[1]
    assert set(seen) == {torch.float32}
    for model, stated in ((wide, True), (narrow, False)):
        zoo.save(zoo.create(model.config, upstream={"model_type": "mamba2"}), tmp_path / f"{stated}", format="hf")
        assert json.loads((tmp_path / f"{stated}" / "config.json").read_text())["residual_in_fp32"] is stated


class Hub:
    """Stand-in for huggingface_hub over a folder of repositories: `snapshot_download` fills `cache`."""

    def __init__(self, repositories: Path, cache: Path) -> None:
        self.repositories, self.cache, self.fetched, self.revisions = repositories, cache, [], []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], revision: str | None, **how: float) -> str:
        assert how == {"etag_timeout": 3, "local_files_only": False}
        self.revisions.append(revision)
        found = [file for file in sorted((self.repositories / repo_id).iterdir()) if any(map(file.match, allow_patterns))]
        (self.cache / repo_id).mkdir(parents=True, exist_ok=True)
        for file in found:
            self.fetched.append(file.name)
            shutil.copy(file, self.cache / repo_id / file.name)
        return str(self.cache / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setitem(sys.modules, "huggingface_hub", made := Hub(tmp_path / "hub", tmp_path / "cache"))
    monkeypatch.setattr("zoo.checkpoints.hub._why_offline", lambda repository: None)
    return made


@torch.no_grad()
def test_pretrained_downloads_one_format_of_the_weights(hub: Hub) -> None:
    folder = hub.repositories / "jet-ai" / "tiny"
    shutil.copytree(ORACLES / "jet-nemotron-a", folder, ignore=shutil.ignore_patterns("io*"))
    shard(folder)
    for other in ("pytorch_model.bin", "consolidated.safetensors", "tokenizer.json", "modeling_jet_nemotron.py", "flax_model.msgpack"):
        (folder / other).write_bytes(b"x")
    parent = zoo.load(folder)
    model = zoo.create(parent.config, evict="hard", window=8, loops=2, hub="jet-ai/tiny@94cbd12", pretrained=True)
    assert hub.revisions == ["94cbd12"]
    assert hub.fetched == ["config.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX, "tokenizer.json"]
    for name, tensor in parent.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, parent(ids).logits)


def test_pretrained_reads_pickled_weights_where_there_are_no_others(hub: Hub) -> None:
    (hub.repositories / "state-spaces").mkdir(parents=True)
    tensors = rename("mamba2-a", hub.repositories / "state-spaces" / "tiny", {}, {"backbone.embeddings": "backbone.embedding"})
    config = {"d_model": 64, "n_layer": 4, "vocab_size": 256, "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16}}
    (hub.repositories / "state-spaces" / "tiny" / "config.json").write_text(json.dumps({**config, "tie_embeddings": False}))
    torch.save(tensors, hub.repositories / "state-spaces" / "tiny" / "pytorch_model.bin")
    parent = zoo.load(hub.repositories / "state-spaces" / "tiny")
    model = zoo.create(parent.config, hub="state-spaces/tiny", pretrained=True)
    assert hub.fetched == ["config.json", "pytorch_model.bin"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in parent.state_dict().items())


def test_pretrained_without_published_weights_or_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(zoo.ZooError, match="gdn4: pretrained: no published weights"):
        zoo.create("gdn4", pretrained=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(zoo.ZooError, match=r"jet2b: pretrained: .*jet-ai/Jet-Nemotron-2B"):
        zoo.create("jet2b", device="meta", pretrained=True)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (
            "falcon-h1-tiny-90m",
            {
                "layers": "parallel",
                "blocks": {
                    "parallel": {
                        "attn": {"heads": 2, "kv_heads": 1, "head_dim": 16, "scale": None},
                        "mamba2": {"heads": 2, "head_dim": 16, "state_dim": 8},
                    }
                },
            },
        ),
        (
            "granite4-h-350m",
            {
                "layers": "mamba2 attn",
                "blocks": {"attn": {"heads": 2, "kv_heads": 1, "scale": None}, "mamba2": {"head_dim": 16, "state_dim": 8}},
            },
        ),
    ],
)
def test_a_scale_that_is_not_stated_is_written_for_upstream(tmp_path: Path, name: str, fields: dict) -> None:
    model = zoo.create(name, vocab_size=32, d_model=32, d_ff=32, **fields)
    zoo.save(model, tmp_path / "hf", format="hf")
    ids = torch.arange(12)[None]
    assert torch.allclose(zoo.load(tmp_path / "hf")(ids).logits, model(ids).logits, atol=1e-6)


def test_a_repository_is_loaded_by_its_address(hub: Hub, tmp_path: Path) -> None:
    model = zoo.create("gdn4-sleep2-hard8", layers="gdn", d_model=16, d_ff=16)
    zoo.save(model, hub.repositories / "me" / "sleeper")
    for address in ("hf://me/sleeper", "hf://me/sleeper@v1.0"):
        assert torch.equal(zoo.load(address).embed.weight, model.embed.weight)
        assert torch.equal(zoo.create(model.config, pretrained=address, seed=3).embed.weight, model.embed.weight)
    assert hub.revisions == [None, None, "v1.0", "v1.0"]
    assert set(hub.fetched) == {"zoo.yaml", "model.safetensors"}
    result = CliRunner().invoke(main, ["convert", "hf://me/sleeper", str(tmp_path / "copy"), "loops=3"])
    assert result.exit_code == 0, result.output
    assert zoo.load(tmp_path / "copy").config.loops == 3


@pytest.mark.parametrize("address", ["hf://me", "hf://me/a/b", "hf://me/sleeper@", "hf:///x", "hf://me/sle eper"])
def test_an_address_that_is_none(hub: Hub, address: str) -> None:
    with pytest.raises(zoo.ZooError, match="want hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        zoo.load(address)
    assert hub.fetched == []


def rename(name: str, folder: Path, config: dict, names: dict[str, str], **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of an oracle under other names, beside another config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(ORACLES / name / "model.safetensors")
    return {re.sub("|".join(names), lambda match: names[match[0]], key): value for key, value in tensors.items()} | extra


@torch.no_grad()
def test_the_language_model_of_a_multimodal_folder(tmp_path: Path) -> None:
    text = json.loads((ORACLES / "gdn-qwen3_5-a" / "config.json").read_text())
    tied = text.pop("tie_word_embeddings")
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1}, "tie_word_embeddings": tied}
    other = {"model.visual.patch_embed.weight": torch.ones(3), "mtp.norm.weight": torch.ones(3)}
    tensors = rename("gdn-qwen3_5-a", tmp_path / "x", config, {"model.": "model.language_model."}, **other)
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"2 tensors are not part of the language model and were skipped: model.visual.\*, mtp.\*"):
        model = zoo.load(tmp_path / "x")
    io = load_file(ORACLES / "gdn-qwen3_5-a" / "io.safetensors")
    assert torch.equal(model(io["input_ids"]).logits, zoo.load(ORACLES / "gdn-qwen3_5-a")(io["input_ids"]).logits)
    zoo.save(model, tmp_path / "text", format="hf")
    written = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])
    assert load_file(tmp_path / "text" / "model.safetensors").keys() == load_file(ORACLES / "gdn-qwen3_5-a" / "model.safetensors").keys()
    assert torch.equal(zoo.load(tmp_path / "text")(io["input_ids"]).logits, model(io["input_ids"]).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba1-a", "mamba2-a"])
def test_folders_of_the_authors_of_mamba(name: str, tmp_path: Path) -> None:
    stated = {"d_state": 16, "dt_rank": 4} if name == "mamba1-a" else {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 16}
    tied = name == "mamba1-a"
    config = {"d_model": 64, "n_layer": 4, "vocab_size": 250, "ssm_cfg": stated, "pad_vocab_size_multiple": 16, "tie_embeddings": tied}
    tensors = rename(name, tmp_path / "x", config, {"backbone.embeddings": "backbone.embedding"})
    tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"])
    torch.save(tensors, tmp_path / "x" / "pytorch_model.bin")
    model, io = zoo.load(tmp_path / "x"), load_file(ORACLES / name / "io.safetensors")
    assert torch.equal(model(io["input_ids"]).logits, zoo.load(ORACLES / name)(io["input_ids"]).logits)
    zoo.save(model, tmp_path / "hf", format="hf")
    assert torch.equal(zoo.load(tmp_path / "hf")(io["input_ids"]).logits, model(io["input_ids"]).logits)
    for fields, words in (
        ({"attn_layer_idx": [1]}, ("attn_layer_idx", "[1]")),
        ({"d_intermediate": 128}, ("d_intermediate", "128")),
        ({"rms_norm": False}, ("rms_norm",)),
        ({"ssm_cfg": {**stated, "layer": "Mamba3"}}, ("ssm_cfg.layer", "'Mamba3'")),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, ("D_has_hdim",)),
        ({"ssm_cfg": {**stated, "d_stat": 3}}, ("d_stat",)),
    ):
        (tmp_path / "x" / "config.json").write_text(json.dumps({**config, **fields}))
        refuses(tmp_path / "x", *words)


@torch.no_grad()
def test_folders_of_the_authors_of_gated_delta_net(tmp_path: Path) -> None:
    """Nine heads of 0.75 and 1.5 times the width, a bias on the write strength, and a D that nothing reads."""
    block = {"mixer_norm": "norm_1", "mlp_norm": "norm_2"}
    block |= {"mlp.gate_proj": "mlp.swiglu.w1", "mlp.up_proj": "mlp.swiglu.w2", "mlp.down_proj": "mlp.swiglu.w3"}
    gdn = {"a_proj": "gk_proj", "o_norm": "g_norm_swish_gate", **{f"{x}_conv": f"{x}_conv1d.weight" for x in "qkv"}}
    config = {"name": "x", "vocab_size": 61, "padding_multiple": 64, "padded_vocab_size": 64, "n_layer": 3, "n_embd": 48, "n_head": 4}
    config |= {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "local_window": 5, "mlp": True, "norm_eps": 1e-5}
    config |= {"gated_delta_per_layer": 2, "mb_per_layer": -1, "mamba_init": True, "n_query_groups": 2, "intermediate_size": 96}
    config |= {"_norm_class": "FusedRMSNorm", "_mlp_class": "LLaMAMLP", "attn_layer_pos": None}
    made = zoo.create(
        {
            **{"name": "x", "vocab_size": 64, "d_model": 48, "d_ff": 96, "layers": "gdn swa gdn", "norm_eps": 1e-5, "tie_embeddings": True},
            "blocks": {
                "gdn": {"heads": 9, "head_dim": 4, "expand_v": 2, "write_bias": True},
                "swa": {"heads": 4, "kv_heads": 2, "window": 5},
            },
        }
    )
    for index in (0, 2):
        made.blocks[index].mixer.b_proj.bias.copy_(torch.linspace(-1, 1, 9))
    ours = made.state_dict()
    theirs = {"transformer.wte.weight": ours["embed.weight"], "lm_head.weight": ours["embed.weight"]}
    theirs["transformer.ln_f.weight"] = ours["norm.weight"]
    for name, tensor in ours.items():
        if name.startswith("blocks."):
            _, layer, inner = name.split(".", 2)
            if layer == "1" and inner.startswith("mixer."):
                continue
            for old, new in {**block, **gdn, "mixer.": "attn."}.items():
                inner = inner.replace(old, new)
            theirs[f"transformer.h.{layer}.{inner}"] = tensor[:, None] if "conv1d" in inner else tensor
    q, k, v = (ours[f"blocks.1.mixer.{x}_proj.weight"].unflatten(0, (2, -1)) for x in "qkv")
    theirs["transformer.h.1.attn.attn.weight"] = torch.cat([q, k, v], dim=1).flatten(0, 1)
    theirs["transformer.h.1.attn.proj.weight"] = ours["blocks.1.mixer.o_proj.weight"]
    theirs |= {f"transformer.h.{layer}.attn.D": torch.ones(9) for layer in (0, 2)}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    torch.save({"model": theirs, "hparams": {"lr": 1e-3}, "iter_num": 7}, tmp_path / "x" / "iter-000007-model-ckpt.pth")
    loaded, ids = zoo.load(tmp_path / "x"), torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    zoo.save(loaded, tmp_path / "back", format="hf")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    again = zoo.Model(loaded.config.model_copy(update={"upstream": {"model_type": "lit_gpt"}}))
    again.load_state_dict(loaded.state_dict())
    zoo.save(again, tmp_path / "again", format="hf")
    assert torch.equal(zoo.load(tmp_path / "again")(ids).logits, made(ids).logits)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama-swa-a", {"use_sliding_window": False}, ("layer_types", "use_sliding_window")),
        ("llama-swa-a", {"layer_types": ["full_attention"]}, ("layer_types", "1 entry", "num_hidden_layers is 5")),
        ("llama-swa-a", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ("type", "'longrope'", "'llama3'")),
        ("llama-swa-a", {"rope_scaling": {"type": "linear"}}, ("factor", "missing")),
        ("llama-swa-a", {"rope_scaling": {"type": "linear", "factor": -1.0}}, ("rope_scaling.factor", "-1.0")),
        ("llama-swa-a", {"rope_scaling": {"type": "dynamic", "factor": 2, "partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
        ("ouro-a", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("type", "'linear'")),
        ("ouro-a", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ("llama-swa-a", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ("rope_parameters", "full_attention")),
        ("llama-swa-a", {"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ("nemotron-h-a", {"n_group": 2}, ("n_group: 2 is not supported",)),
        ("nemotron-h-a", {"hybrid_override_pattern": "M--*EME"}, ("layer 2 is an MLP",)),
        ("nemotron-h-a", {"hybrid_override_pattern": "M-X*EME"}, ("hybrid_override_pattern: 'X'",)),
        ("gdn-kimi-linear-a", {"hidden_act": "situ"}, ("hidden_act: 'situ'",)),  # Kimi K3
        ("gdn-kimi-linear-a", {"q_lora_rank": 8}, ("q_lora_rank: 8 is not supported",)),
        ("gdn-kimi-linear-a", {"num_expert_group": 2}, ("num_expert_group: 2 is not supported",)),
        ("gdn-kimi-linear-a", {"mlp_layer_types": ["dense"]}, ("mlp_layer_types", "1 entry", "num_hidden_layers is 4")),
        ("jamba-a", {"attn_layer_offset": 4}, ("attn_layer_offset: 4; want 0 to 3",)),
        ("bamba-a", {"attn_rotary_emb": 16}, ("attn_rotary_emb: 16",)),
        ("bamba-a", {"mamba_n_heads": 6}, ("mamba_n_heads: 6 heads of mamba_d_head 16",)),
        ("falcon-h1-a", {"mamba_n_heads": 5}, ("mamba_n_heads: 5 heads of mamba_d_head 16; want 96 channels",)),
        ("falcon-h1-a", {"ssm_multipliers": [1, 1]}, ("ssm_multipliers: 2 factors; want 5",)),
        ("falcon-h1-a", {"key_multiplier": 0}, ("key_multiplier: 0 must be greater than 0",)),
        ("falcon-h1-a", {"mamba_use_mlp": False}, ("mamba_use_mlp: False is not supported",)),
        ("granite-a", {"position_embedding_type": "alibi"}, ("position_embedding_type: 'alibi'",)),
        ("ouro-a", {"early_exit_step": 4}, ("exit.loop: 4", "4 wake loops")),
        ("samba-a", {"bias": ...}, ("bias", "True")),
        ("gdn-fla-a", {"attnres_block_size": 4}, ("attnres_block_size", "4")),
        ("gdn-fla-a", {"attn": {"layers": [9], "num_heads": 2}}, ("attn: layers: 9",)),
        ("mamba1-a", {"intermediate_size": 100}, ("intermediate_size", "100")),
        ("jet-nemotron-a", {"efficient_attention_config": {"jet": {"window": 3}, "swa": {"window_size": 16}}}, ("jet: window",)),
    ],
)
def test_fields_that_change_what_is_computed(name: str, fields: dict, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ORACLES / name, tmp_path / "x"))
    edit_config(folder, **fields)
    refuses(folder, "config.json", *words)


@torch.no_grad()
def test_kimi_linear_without_experts(tmp_path: Path) -> None:
    """Every layer dense, written without the config.json that was read."""
    parent = zoo.load(ORACLES / "gdn-kimi-linear-a").config
    made = zoo.create({**parent.model_dump(), "mlp": "swiglu", "mlps": {}, "upstream": {"model_type": "kimi_linear"}})
    zoo.save(made, tmp_path / "x", format="hf")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["mlp_layer_types"] == ["dense"] * 4
    ids = torch.arange(20)[None]
    assert torch.equal(zoo.load(tmp_path / "x")(ids).logits, made(ids).logits)


def test_defaults_of_upstream_where_a_field_is_absent() -> None:
    """As in the config classes of transformers 5."""
    base = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 30, "num_attention_heads": 32}
    read = {kind: families.get(kind).read({**base, "use_sliding_window": True}) for kind in ("llama", "mistral", "qwen2", "qwen3")}
    assert [fields["layers"] for fields in read.values()] == ["attn*30", "swa*30", "attn*28 swa*2", "attn*28 swa*2"]
    options = {kind: next(iter(fields["blocks"].values())) for kind, fields in read.items()}
    assert [x["kv_heads"] for x in options.values()] == [32, 8, 32, 32]
    assert [x["head_dim"] for x in options.values()] == [2, 2, 2, 128]
    assert read["mistral"]["blocks"]["swa"]["window"] == read["qwen2"]["blocks"]["swa"]["window"] == 4096


@torch.no_grad()
def test_weights_beside_an_index(jet: Path) -> None:
    """What is out of date cannot be told, so both are named; an index without its shards is ignored, as upstream does."""
    whole = (jet / "model.safetensors").read_bytes()
    shard(jet)
    (jet / "model.safetensors").write_bytes(whole)
    refuses(jet, "model.safetensors", INDEX, "out of date")
    for file in jet.glob("model-0*"):
        file.unlink()
    assert zoo.load(jet).embed.weight.dtype == torch.float32
    (jet / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    zoo.load(jet)
    (jet / "pytorch_model.bin").write_bytes(b"older, in another format")
    (jet / "pytorch_model.bin.index.json").write_text("{}")
    zoo.load(jet)


def test_an_adapter_is_noticed(jet: Path, tmp_path: Path) -> None:
    zoo.save(model := zoo.load(jet), tmp_path / "ours")
    for folder in (jet, tmp_path / "ours"):
        (folder / "adapter_config.json").write_text("{}")
        refuses(folder, "adapter_config.json", "merge it")
    (jet / "config.json").unlink()
    refuses(jet, "adapter_config.json")
    with pytest.raises(zoo.ZooError, match=r"adapter_config\.json"):
        zoo.create(model.config, pretrained=tmp_path / "ours")


def test_rounding_to_the_main_dtype_is_said(tmp_path):
    """Norms and decays stay as wide as they are stored; a head in float32 does not, in a model of bfloat16."""
    folder = shutil.copytree(ORACLES / "mamba2-a", tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    wide = {name for name in tensors if name.endswith(("norm.weight", "norm_f.weight", "A_log", "dt_bias", ".D"))}
    narrow = {name: x if name in wide else x.bfloat16() for name, x in tensors.items()}
    save_file(narrow, folder / "model.safetensors")
    edit_config(folder, torch_dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.load(folder)
    head = next(name for name in tensors if "embeddings" in name)
    save_file({**narrow, head: tensors[head]}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=rf"^{re.escape(str(folder))}: 1 tensor of another dtype rounded to bfloat16: {head}$"):
        zoo.load(folder)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_norms_and_decays_stay_float32(jet: Path, dtype: torch.dtype | None) -> None:
    tensors = load_file(jet / "model.safetensors")
    wide = {name for name in tensors if "norm" in name or name.endswith(("A_log", "dt_bias"))}
    save_file({name: x if name in wide else x.bfloat16() for name, x in tensors.items()}, jet / "model.safetensors")
    edit_config(jet, torch_dtype="bfloat16")
    model = zoo.load(jet, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name or name.endswith(("A_log", "dt_bias")) else dtype or torch.bfloat16)
    out = model(torch.arange(9)[None])
    assert out.logits.dtype == (dtype or torch.bfloat16)
    assert {x.dtype for cache in out.state.window for x in cache} == {dtype or torch.bfloat16}


def test_linears_of_several_dtypes_take_that_of_the_config(jet: Path) -> None:
    edit_tensors(jet, **{"model.layers.0.mlp.up_proj.weight": torch.ones(160, 64, dtype=torch.bfloat16)})
    edit_config(jet, torch_dtype="float16")
    assert zoo.load(jet).blocks[0].mlp.up_proj.weight.dtype == zoo.load(jet).embed.weight.dtype == torch.float16
    edit_config(jet, torch_dtype=...)
    assert zoo.load(jet).blocks[0].mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weights_that_no_training_gives(jet: Path, name: str, value: float) -> None:
    tensor = load_file(jet / "model.safetensors")[name]
    tensor[3 if value else slice(None)] = value
    edit_tensors(jet, **{name: tensor})
    refuses(jet, "model.safetensors", name, "all zero" if value == 0 else "NaN or infinity", "damaged")


def lie(file: Path, change: Callable[[dict], None]) -> None:
    """Change the header of a safetensors file."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "F64"),
        ("dtype", "I32"),
        ("dtype", "F8_E4M3"),
        ("dtype", "X9"),
        ("dtype", 7),
        ("shape", [2**62, 4]),
        ("shape", [-1]),
        ("shape", [1e300]),
        ("shape", "wide"),
        ("data_offsets", [0, 2**63]),
        ("data_offsets", [64, 0]),
        ("data_offsets", [0, 0]),
        ("data_offsets", None),
    ],
)
def test_headers_that_lie(jet: Path, field: str, value: object) -> None:
    lie(jet / "model.safetensors", lambda header: header["model.norm.weight"].update({field: value}))
    refuses(jet, "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"a": ', "\xff", "[" * 100_000, '{"a": ' * 100_000, '{"model_type": ' + "9" * 10_000]
)
def test_json_that_is_no_object(jet: Path, name: str, content: str) -> None:
    shard(jet)
    (jet / name).write_text(content, encoding="latin-1")
    refuses(jet, name)


def test_json_of_absurd_length(jet: Path) -> None:
    with (jet / "config.json").open("r+b") as file:
        file.truncate(2**40)  # a sparse file
    refuses(jet, "config.json", "1099511627776 bytes")


@pytest.mark.parametrize("name", ["jet-nemotron-a", "mamba2-a", "ouro-a", "samba-a", "gdn-fla-a", "gdn-qwen3_5-a"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**63, 10**30, 1e300, float("nan"), float("inf"), "7", [7], {}, True, 10**400])
def test_absurd_sizes(name: str, value: object, tmp_path: Path) -> None:
    """Every number of a config in turn: refused in one line, or of no effect."""
    folder = Path(shutil.copytree(ORACLES / name, tmp_path / "x", ignore=shutil.ignore_patterns("io*", "README*")))
    original = (folder / "config.json").read_text()
    for key, old in json.loads(original).items():
        if isinstance(old, int | float) and not isinstance(old, bool):
            edit_config(folder, **{key: value})
            assert "\n" not in (said := refusal(folder)), key
            assert len(said) < 2000, key
            (folder / "config.json").write_text(original)


def test_damaged_pickles(tmp_path: Path) -> None:
    """Cut, flipped and junk bytes: refused in one line, or unnoticed where only a weight changed."""
    (tmp_path / "config.json").write_bytes((ORACLES / "mamba1-a" / "config.json").read_bytes())
    file = tmp_path / "pytorch_model.bin"
    torch.save(load_file(ORACLES / "mamba1-a" / "model.safetensors"), file)
    whole = file.read_bytes()
    for seed in range(40):
        chance = random.Random(seed)
        content, at = bytearray(whole), chance.randrange(len(whole) if seed % 2 else 4000)
        match seed % 4:
            case 0 | 1:
                content[at : at + 8] = chance.randbytes(8)
            case 2:
                del content[at:]
            case 3:
                content[at:at] = chance.randbytes(16)
        file.write_bytes(content)
        assert "\n" not in refusal(tmp_path)

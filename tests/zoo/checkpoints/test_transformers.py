"""Rotary scalings, partial rotary widths and attention biases against transformers: its stored logits, and itself (extended)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from tests.zoo.checkpoints.make_oracles import CASES, FOLDER, IDS, logits, model

STORED = json.loads((FOLDER / "cases.json").read_text())
LOGITS = load_file(FOLDER / "logits.safetensors")


def folder_of(case: str, path: Path, config: dict | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or STORED[case]["config"]))
    (path / "model.safetensors").symlink_to(FOLDER / f"{STORED[case]['weights']}.safetensors")
    return path


def old_spelling(config: dict) -> dict:
    """Rotary fields as transformers 4 wrote them."""
    rope = dict(config["rope_parameters"])
    top = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    return {**old, **top, "rope_scaling": None if scaling == {"type": "default"} else scaling}


@torch.no_grad()
def stepwise(made: zoo.Model) -> Tensor:
    steps, state = [], None
    for token in IDS.split(1, dim=1):
        out = made(token, state)
        steps.append(out.logits)
        state = out.state
    return torch.cat(steps, dim=1)


@pytest.mark.filterwarnings("ignore:partial_rotary_factor")
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_stored_logits(case: str, tmp_path: Path) -> None:
    """Up to four times the original length, in both spellings of the config; "dynamic" differs token by token."""
    for spelling in (dict, old_spelling):
        made = zoo.load(folder_of(case, tmp_path / spelling.__name__, spelling(STORED[case]["config"])))
        torch.testing.assert_close(made(IDS).logits, LOGITS[case], rtol=0, atol=1e-5)
        torch.testing.assert_close(stepwise(made), LOGITS[f"{case}, token by token"], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:partial_rotary_factor")
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    """Without the config.json that was read, the written one still describes the same model."""
    made = zoo.load(folder_of(case, tmp_path / "read"))
    upstream = {"model_type": made.config.upstream["model_type"]}
    again = zoo.Model(made.config.model_copy(update={"upstream": upstream}))
    again.load_state_dict(made.state_dict())
    zoo.save(again, tmp_path / "written", format="hf")
    assert torch.equal(zoo.load(tmp_path / "written")(IDS).logits, made(IDS).logits)
    theirs, ours = load_file(tmp_path / "read" / "model.safetensors"), load_file(tmp_path / "written" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@torch.no_grad()
@pytest.mark.parametrize("case", ["dynamic", "odd dynamic"])
def test_dynamic_frequencies_in_pools_packed_and_in_slices(case: str, tmp_path: Path) -> None:
    """The frequencies follow the length of each stream, however the stream is run."""
    made = zoo.load(folder_of(case, tmp_path / "x"))
    ends = torch.tensor([0, 20, 23, 64])
    whole = torch.cat([made(part).logits for part in IDS.split(ends.diff().tolist(), dim=1)], dim=1)
    torch.testing.assert_close(made(IDS, cu_seqlens=ends).logits, whole)
    with zoo.SessionPool(made, context=64) as pool:
        streams = [pool.open() for _ in range(2)]
        for stream, ids in zip(streams, (IDS[:, :40], IDS[:, :9]), strict=True):
            session = zoo.Session(made)
            assert list(stream.generate(ids, tokens=6)) == list(session.generate(ids, tokens=6))


@torch.no_grad()
def test_sharded_bin_with_stored_frequencies(tmp_path: Path) -> None:
    path = folder_of("llama3", tmp_path / "x")
    tensors = {**load_file(path / "model.safetensors"), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    (path / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {f"pytorch_model-0000{i}-of-00002.bin": {} for i in (1, 2)}
    for i, (name, tensor) in enumerate(tensors.items()):
        shards[f"pytorch_model-0000{i % 2 + 1}-of-00002.bin"][name] = tensor
    for shard, content in shards.items():
        torch.save(content, path / shard)
    places = {name: shard for shard, content in shards.items() for name in content}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    torch.save({}, path / "training_args.bin")
    torch.testing.assert_close(zoo.load(path)(IDS).logits, LOGITS["llama3"], rtol=0, atol=1e-5)


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore:partial_rotary_factor")
@pytest.mark.parametrize("case", CASES)
def test_beside_transformers(case: str, tmp_path: Path) -> None:
    theirs = model(case)
    theirs.save_pretrained(tmp_path / "x")
    made = zoo.load(tmp_path / "x")
    whole, steps = logits(theirs)
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, LOGITS[case], rtol=0, atol=1e-5)
        torch.testing.assert_close(whole, LOGITS[case], rtol=0, atol=1e-5)
        torch.testing.assert_close(stepwise(made), steps, rtol=0, atol=1e-5)


@pytest.mark.extended
def test_transformers_reads_the_old_spelling_alike() -> None:
    import transformers

    for case, stored in STORED.items():
        old = transformers.AutoConfig.for_model(**old_spelling(stored["config"]))
        assert old.rope_parameters.items() >= {k: v for k, v in stored["config"]["rope_parameters"].items() if k != "type"}.items(), case


@pytest.mark.extended
def test_float32_norms_beside_bfloat16(tmp_path: Path) -> None:
    """Mean KL divergence from float64 over 4,096 positions: at most 1.1 times that of transformers."""
    import transformers

    path = folder_of("llama3", tmp_path / "x")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file({name: x if "norm" in name else x.bfloat16() for name, x in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**STORED["llama3"]["config"], "dtype": "bfloat16"}))
    ids = torch.randint(32, (64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = zoo.load(path, dtype=torch.float64)(ids).logits.log_softmax(-1)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")(ids).logits
        made = zoo.load(path)
        assert made.norm.weight.dtype == torch.float32
        kl = [(exact.exp() * (exact - x.double().log_softmax(-1))).sum(-1).mean() for x in (made(ids).logits, theirs)]
    assert 0 < kl[0] < 1.1 * kl[1]

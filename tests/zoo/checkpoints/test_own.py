"""Saving and loading: atomic, never over existing files, never from damaged ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo


@pytest.fixture
def saved(tmp_path):
    model = zoo.create("gdn4-sleep4", d_model=16, tie_embeddings=True, dtype=torch.bfloat16, seed=5)
    zoo.save(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip(saved):
    model, path = saved
    loaded = zoo.load(path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert zoo.load(path, dtype=torch.float32).embed.weight.dtype == torch.float32
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "zoo.yaml"]
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_what_is_added_between_passes_has_no_effect_at_first(tmp_path):
    zoo.save(zoo.create("gdn4-sleep2-hard8", d_model=16, d_ff=16, vocab_size=11), tmp_path / "plain")
    plain, model = zoo.load(tmp_path / "plain"), zoo.load(tmp_path / "plain", inject=True, residual_gates=2)
    assert (model.inject == 0).all()
    assert (model.residual_gates == 0).all()
    ids = torch.arange(8)[None]
    assert all(torch.equal(a, b) for a, b in zip(plain.consolidate(ids).fast, model.consolidate(ids).fast, strict=True) if a is not None)


def test_nothing_is_overwritten(saved):
    _, path = saved
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(zoo.ZooError, match="already exists"):
        zoo.save(zoo.create("gdn4", d_model=8), path)
    assert (path / "model.safetensors").read_bytes() == before


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.checkpoints.own.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(zoo.ZooError, match=r"model/model\.safetensors: cannot be written: disk full$"):
        zoo.save(zoo.create("gdn4", d_model=8), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.999])
def test_a_checkpoint_cut_short(saved, part):
    _, path = saved
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(zoo.ZooError, match=r"model\.safetensors: cannot be read"):
        zoo.load(path)


def _change(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "'norm.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is not part of gdn4-sleep4"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"'norm.weight' is \[3\], the config wants \[16\]"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    _, path = saved
    _change(path, change)
    with pytest.raises(zoo.ZooError, match=message):
        zoo.load(path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(zoo.ZooError, match="nowhere: no such folder"):
        zoo.load(tmp_path / "nowhere")
    with pytest.raises(zoo.ZooError, match=r"no zoo\.yaml and no upstream config\.json"):
        zoo.load(tmp_path)
    (tmp_path / "zoo.yaml").write_text("name: x\nvocab_size: 3\nd_model: 8\nlayers: gdn\n")
    with pytest.raises(zoo.ZooError, match=r"model\.safetensors: cannot be read: no such file"):
        zoo.load(tmp_path)

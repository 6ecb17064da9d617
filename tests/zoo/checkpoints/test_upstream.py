"""Tiny models that were run through their upstream code: same logits, and the same tensors and config when written back.

tests/data/oracles/*/README.md describe how each was made. Entries named *_BUGGY record upstream defects.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.blocks.positions import Positions
from zoo.checkpoints.family import families, links
from zoo.checkpoints.upstream import read_config

ORACLES = Path(__file__).parents[2] / "data" / "oracles"
NAMES = sorted(path.name for path in ORACLES.iterdir() if (path / "io.safetensors").is_file() and path.name != "gdn-layer-a")
PIECES = (5, 1, 2, 17, 3, 20)


def tolerance(name: str, want: torch.Tensor) -> float:
    return (2e-4 if name.startswith(("gdn", "jet")) else 5e-5) * max(1.0, want.std().item())


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance(name, want))


def in_pieces(model: zoo.Model, ids: torch.Tensor, pieces: tuple[int, ...]) -> torch.Tensor:
    logits, state = [], None
    for piece in ids.split(list(pieces), dim=1):
        out = model(piece, state)
        logits.append(out.logits)
        state = out.state
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module", params=NAMES)
def oracle(request: pytest.FixtureRequest) -> tuple[str, zoo.Model, dict[str, torch.Tensor]]:
    folder = ORACLES / request.param
    return request.param, zoo.load(folder).eval(), load_file(folder / "io.safetensors")


@torch.no_grad()
def test_logits(oracle) -> None:
    name, model, io = oracle
    assert_close(name, model(io["input_ids"]).logits, io["logits"])
    if "input_ids_long" in io:
        assert_close(name, model(io["input_ids_long"]).logits, io["logits_long"])


@torch.no_grad()
def test_logits_token_by_token(oracle) -> None:
    name, model, io = oracle
    assert_close(name, in_pieces(model, io["input_ids"], (1,) * io["input_ids"].shape[1]), io["logits"])
    if "decode_logits" in io:
        assert_close(name, io["decode_logits"], io["logits"])


@torch.no_grad()
def test_logits_in_uneven_pieces(oracle) -> None:
    name, model, io = oracle
    assert_close(name, in_pieces(model, io["input_ids"], PIECES), io["logits"])


def test_round_trip(oracle, tmp_path: Path) -> None:
    name, model, _ = oracle
    zoo.save(model, tmp_path / "hf", format="hf")
    want, got = load_file(ORACLES / name / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == want.keys()
    for tensor, value in want.items():
        assert got[tensor].dtype == value.dtype
        assert torch.equal(got[tensor], value), tensor
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((ORACLES / name / "config.json").read_text())


def test_written_config_means_the_same(oracle, tmp_path: Path) -> None:
    """Without the config.json that was read, the written one describes the same model."""
    _, model, io = oracle
    zoo.save(model, tmp_path / "zoo")
    kind = {"model_type": model.config.upstream.get("model_type", "lit_gpt")}
    again = zoo.Model(model.config.model_copy(update={"upstream": kind}))
    again.load_state_dict(zoo.load(tmp_path / "zoo").state_dict())
    zoo.save(again, tmp_path / "hf", format="hf")
    back = zoo.load(tmp_path / "hf")
    assert back.config.upstream != model.config.upstream
    with torch.no_grad():
        assert torch.equal(back(io["input_ids"]).logits, model(io["input_ids"]).logits)


@torch.no_grad()
def test_ouro_exits() -> None:
    folder = ORACLES / "ouro-a"
    model, io = zoo.load(folder), load_file(folder / "io.safetensors")
    exits = {f"step {u}": ({"loop": u}, io["logits_step"][u]) for u in range(4)}
    exits["threshold"] = {"threshold": 0.5}, io["logits_thr05"]
    exits["weighted"] = {"threshold": None, "weighted": True}, io["logits_weighted"]
    exits["last"] = {"threshold": None}, io["logits_step"][3]
    for exit, want in exits.values():
        variant = zoo.create(model.config, exit=exit)
        variant.load_state_dict(model.state_dict())
        assert_close("ouro", variant(io["input_ids"]).logits, want)
        assert_close("ouro", in_pieces(variant, io["input_ids"], PIECES), want)
    torch.testing.assert_close(model.exit.chances(io["step_hidden"].movedim(0, -2)), io["exit_pdf"])


@torch.no_grad()
def test_blocks_inserted_into_ouro_change_nothing_before_training() -> None:
    folder = ORACLES / "ouro-a"
    parent, io = zoo.load(folder).config, load_file(folder / "io.safetensors")
    jet = {"heads": 2, "head_dim": 16, "mlp": False, "inserted": True}
    fields = {**parent.model_dump(), "layers": "(attn*2 jet)*2", "wake_loops": 1, "blocks": {**parent.blocks, "jet": jet}}
    augmented = zoo.create(fields, pretrained=folder)
    logits = augmented(io["input_ids"]).logits
    assert torch.equal(logits, zoo.create(parent, wake_loops=1, pretrained=folder)(io["input_ids"]).logits)
    assert_close("ouro", logits, io["logits_step"][0])
    sleeping = zoo.create({**fields, "evict": "hard", "window": 8, "loops": 3}, pretrained=folder)
    assert sleeping.consolidate(io["input_ids"][:, :8]).fast[2].abs().max() > 0


@torch.no_grad()
def test_mamba2_steps_are_clamped_in_decode_too() -> None:
    folder = ORACLES / "mamba2-a"
    model, io = zoo.load(folder), load_file(folder / "io.safetensors")
    limited = zoo.create(model.config, blocks={"mamba2": {"dt_limit": [0.2, 0.6]}})
    limited.load_state_dict(model.state_dict())
    assert_close("mamba2", limited(io["input_ids"]).logits, io["logits_dtlimit"])
    assert_close("mamba2", in_pieces(limited, io["input_ids"], (1,) * 48), io["logits_dtlimit"])


@torch.no_grad()
def test_one_gated_delta_net_layer() -> None:
    folder = ORACLES / "gdn-layer-a"
    model = zoo.Model(read_config(folder))
    mixer, io, stored = model.blocks[0].mixer, load_file(folder / "io.safetensors"), load_file(folder / "model.safetensors")
    for link in links(families.get("qwen3_next"), model):
        if link.theirs.startswith("model.layers.0.linear_attn."):
            ours = [mixer.get_parameter(name.removeprefix("blocks.0.mixer.")) for name in link.ours]
            parts = link.unpack(stored[link.theirs.removeprefix("model.layers.0.")], [x.shape[0] for x in ours])
            for parameter, part in zip(ours, parts, strict=True):
                parameter.copy_(part)
    steps = Positions(0, io["hidden"].shape[1], torch.device("cpu"))
    y, fast, _ = mixer(io["hidden"], mixer.new_fast(2), mixer.new_window(2), steps)
    assert_close("gdn", y, io["out"])
    torch.testing.assert_close(fast.double(), io["final_state_f64"], rtol=0, atol=1e-5)


def test_both_spellings_of_rotary_fields(tmp_path: Path) -> None:
    for name in ("gdn-qwen3next-a", "llama-swa-a"):
        old = json.loads((ORACLES / name / "config.json").read_text())
        stated = old.pop("rope_parameters", None) or {"rope_theta": old.pop("rope_theta"), "rope_type": "default"}
        new = {**old, "rope_parameters": stated}
        old |= {key: value for key, value in stated.items() if key != "rope_type"}
        read = []
        for spelling, config in (("old", old), ("new", new)):
            folder = tmp_path / f"{name}-{spelling}" / "x"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "model.safetensors").symlink_to(ORACLES / name / "model.safetensors")
            read.append(zoo.load(folder).config.blocks)
        assert read[0] == read[1] == zoo.load(ORACLES / name).config.blocks

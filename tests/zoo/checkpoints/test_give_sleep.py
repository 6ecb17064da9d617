"""A checkpoint of one's own is made to sleep: with its own fast weights, or with blocks that are inserted."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import zoo
from tests.naive_families import NaiveFamily
from tests.zoo.checkpoints.test_upstream import ORACLES
from zoo.cli import main

pytestmark = pytest.mark.extended  # the checkpoints are written by transformers
SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
INSERTED = {"layers": "attn gdn attn gdn", "blocks": {"gdn": {"heads": 2}}, "span": (1, 2)}
GIVEN = {"llama": INSERTED, "qwen3": INSERTED, "mamba2": {}, "qwen3_5_text": {}, "jet_nemotron": {"span": (1, 3)}}
"""Tiny checkpoints, and what they are given besides loops, evict and window: inserted blocks, a span."""
IDS = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as transformers writes them, with outputs and fast weights that matter; llama also in our format."""
    import transformers

    base = tmp_path_factory.mktemp("parents")
    made = {}
    torch.manual_seed(0)
    for kind, fields in {
        "llama": {**SIZE, **HEADS},
        "qwen3": {**SIZE, **HEADS},
        "mamba2": {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 1,
        },
        "qwen3_5_text": {**SIZE, **HEADS, **LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    }.items():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
        for name, parameter in model.named_parameters():
            if "A_log" in name:
                torch.nn.init.constant_(parameter, -2.0)  # transformers forgets within a token
            elif parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(base / kind)
        made[kind] = base / kind
    zoo.save(zoo.load(made["llama"]), base / "ours")
    return {**made, "ours": base / "ours", "jet_nemotron": ORACLES / "jet-nemotron-a"}


def trained(model: zoo.Model) -> zoo.Model:
    """What is zero at first, such as the output of inserted blocks, becomes something else, as after training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("evict", ["hard", "sliding"])
@pytest.mark.parametrize("name", GIVEN)
def test_awake_a_checkpoint_computes_the_same_and_a_sleep_changes_it(folders: dict[str, Path], name: str, evict: str) -> None:
    plain, model = zoo.load(folders[name]), zoo.load(folders[name], loops=2, evict=evict, window=24, **GIVEN[name])
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=0)
    trained(model)
    asleep = model(IDS[:, :4], model.consolidate(IDS)).logits
    once = model(IDS[:, :4], model.consolidate(IDS, loops=1)).logits
    assert (asleep - once).abs().max() > 1e-4
    with pytest.raises(zoo.ZooError, match="lops: unknown field; did you mean 'loops'"):
        zoo.load(folders[name], lops=2)


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("evict", ["hard", "sliding"])
@pytest.mark.parametrize("name", GIVEN)
def test_three_windows_equal_the_naive_model(folders: dict[str, Path], name: str, evict: str, loops: int) -> None:
    model = trained(zoo.load(folders[name], dtype="float64", evict=evict, window=6, loops=loops, **GIVEN[name]))
    naive, state = NaiveFamily(model), None
    for start in (0, 6, 12):
        naive.asleep(IDS[0, start : start + 6])
        state = model.consolidate(IDS[:, start : start + 6], state)
    want = naive.awake(IDS[0, 18:])
    torch.testing.assert_close(model(IDS[:, 18:], state).logits[0], want, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "ours"])
def test_inserted_blocks_change_nothing_before_training(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    plain = zoo.load(folders[name])
    fields = {"layers": "attn gdn attn gdn", "blocks": {"gdn": {"heads": 2}}, "evict": "hard", "window": 24, "loops": 2}
    model = zoo.load(folders[name], **fields)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert [block.mlp is None for block in model.blocks] == [False, True, False, True]
    zoo.save(model, tmp_path / "inserted")
    again = zoo.load(tmp_path / "inserted")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(zoo.ZooError, match=r"layers .* are not part of the upstream model"):
        zoo.save(model, tmp_path / "hf", format="hf")
    with pytest.raises(zoo.ZooError, match=r"layers: 'attn gdn': want 'attn\*2', with other kinds of blocks inserted"):
        zoo.load(folders[name], layers="attn gdn")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_hard_eviction_needs_fast_weights(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(zoo.ZooError, match=r"^[^\n]*evict: 'hard' empties the window, and no block [^\n]* has fast weights[^\n]*$"):
        zoo.load(folders[name], evict="hard", window=8)
    assert zoo.load(folders[name], evict="sliding", window=8).config.window == 8


def test_every_command_gives_sleep_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    fields = ["layers=attn gdn attn gdn", "evict=hard", "window=8", "loops=2"]
    shown = CliRunner().invoke(main, ["describe", str(folders["qwen3"]), *fields, "--yaml"])
    assert "layers: attn gdn attn gdn" in shown.output
    assert CliRunner().invoke(main, ["convert", str(folders["qwen3"]), str(tmp_path / "copy"), *fields]).exit_code == 0
    assert zoo.load(tmp_path / "copy").config.pattern == ("attn", "gdn", "attn", "gdn")
    hf = ["convert", str(folders["qwen3_5_text"]), str(tmp_path / "hf"), *fields[1:], "--to", "hf"]
    assert CliRunner().invoke(main, hf).exit_code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    model = zoo.load(tmp_path / "hf")
    assert (model.config.loops, model.config.evict, model.config.window) == (2, "hard", 8)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:, :8]).logits, theirs(IDS[:, :8]).logits, atol=1e-4, rtol=1e-4)

"""Every shipped config has the published number of parameters; loops, exits and invalid fields of the config."""

from itertools import pairwise

import pytest
import torch

import zoo
from zoo.config import resolve

PARAMETERS = {
    "jet2b": 1_964_806_208,
    "jet4b": 3_960_424_768,
    "ouro1.4b": 1_434_652_673,
    "ouro2.6b": 2_667_974_657,
    "samba421m": 421.8e6,
    "samba1.3b": 1330.2e6,
    "samba1.7b": 1742.2e6,
    "samba3.8b": 3864.3e6,
    "mamba130m": 129_135_360,
    "mamba370m": 371_516_416,
    "mamba790m": 793_204_224,
    "mamba1.4b": 1_372_178_432,
    "mamba2.8b": 2_768_345_600,
    "bamba-9b": 9_780_235_392,
    "granite4-h-350m": 340_332_224,
    "granite4-h-1b": 1_461_538_368,
    "granite4-h-micro": 3_191_396_096,
    "granite4-h-tiny": 6_939_037_248,
    "granite4-h-small": 32_207_337_984,
    "granite4-micro": 3_402_836_480,
    "falcon-mamba-7b": 7_272_665_088,
    "falcon-h1-tiny-90m": 91_131_072,
    "falcon-h1-0.5b": 521_411_104,
    "falcon-h1-1.5b": 1_554_789_760,
    "falcon-h1-1.5b-deep": 1_554_773_392,
    "falcon-h1-3b": 3_149_261_312,
    "falcon-h1-7b": 7_585_654_880,
    "falcon-h1-34b": 33_642_516_224,
    "jamba-3b": 3_029_337_472,
    "jamba-52b": 51_570_323_328,
    "olmo-hybrid-7b": 7_430_870_688,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "kimi-linear-48b-a3b": 49_122_675_072,
    "nemotron-nano-9b": 8_888_227_328,
    "nemotron3-nano-30b-a3b": 31_577_937_344,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-8b-a1b": 8_339_929_856,
    "recurrentgemma-2b": 2_682_862_080,
    "recurrentgemma-9b": 8_579_977_216,
}


def parameters(name: str) -> int:
    return sum(p.numel() for p in zoo.create(name, device="meta").parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    want = PARAMETERS[name]
    assert parameters(name) == want if isinstance(want, int) else round(parameters(name) / 1e5) == round(want / 1e5)


def test_inserted_blocks_are_less_than_a_tenth_of_ouro() -> None:
    assert parameters("ouro1.4b") < parameters("ourojet1.4b") < 1.1 * parameters("ouro1.4b")
    assert [i for i, kind in enumerate(zoo.create("ourojet1.4b", device="meta").config.pattern) if kind == "jet"] == [4, 9, 14, 19, 24, 29]


def test_the_hybrid_of_ouro() -> None:
    """Full attention at both ends, four times as many layers of GDN, a gate for each of four loops; the rest is Ouro's."""
    hybrid, ouro = resolve("ouro-hybrid-1.4b"), resolve("ouro1.4b")
    pattern, attention = hybrid.pattern, [i for i, kind in enumerate(hybrid.pattern) if kind == "attn"]
    assert len(pattern) == len(ouro.pattern) == 24
    assert set(pattern) == {"attn", "gdn"}
    assert round(len(pattern) / len(attention)) == 5
    assert attention[0] == 0
    assert attention[-1] == 23
    assert len(attention) == attention.index(23) + 1 == 1 + sum(b - a == 1 for a, b in pairwise(attention)) + 1  # two ends
    assert (hybrid.residual_gates, hybrid.wake_loops, resolve("ouro-hybrid-1.4b-sleep4").loops) == (4, 1, 4)
    same = ("vocab_size", "d_model", "d_ff", "loop_norm", "exit")
    assert all(getattr(hybrid, name) == getattr(ouro, name) for name in same)
    assert hybrid.blocks["attn"] == ouro.blocks["attn"]


# larger sizes of models that are tested beside them
LARGER = {"gdn1.3b", "jet4b", "mamba370m", "mamba790m", "mamba1.4b", "mamba2.8b", "ouro2.6b", "samba1.3b", "samba1.7b", "samba3.8b"}
LARGER |= {"mamba2-370m", "mamba2-780m", "mamba2-1.3b", "mamba2-2.7b", "granite4-h-1b", "granite4-h-micro", "granite4-h-small"}
LARGER |= {"lfm2-700m", "lfm2-1.2b", "falcon-h1-0.5b", "falcon-h1-1.5b", "falcon-h1-1.5b-deep", "falcon-h1-3b", "falcon-h1-7b"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.extended) if name in LARGER else name for name in zoo.list_models()])
@pytest.mark.parametrize("depth", ["a layer of each kind", pytest.param("all layers", marks=pytest.mark.extended)])
def test_every_model_sleeps(name: str, depth: str) -> None:
    config = resolve(f"{name}-sleep2")
    assert config.loops == 2
    assert config.window is not None
    if depth == "a layer of each kind":
        kinds, mlps = zip(*dict.fromkeys(zip(config.pattern, config.mlp_pattern, strict=True)), strict=True)
        config = resolve(config, {"layers": " ".join(kinds), "mlp": " ".join(mlps), "span": None})
    model = zoo.create(config, device="meta")
    state = model.consolidate(torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    assert len(state.fast) == len(model.blocks)


def tiny_ouro(**fields) -> zoo.Model:
    base = {"name": "tiny", "vocab_size": 11, "d_model": 16, "layers": "attn swa", "loop_norm": True, "wake_loops": 3}
    blocks = {"attn": {"heads": 2, "post_norm": True}, "swa": {"heads": 2, "window": 3, "post_norm": True}}
    return zoo.create({**base, "blocks": blocks, **fields}, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("exit", [None, {"threshold": 0.4}, {"threshold": None, "weighted": True}])
def test_every_wake_loop_has_its_own_cache(exit) -> None:
    model = tiny_ouro(exit=exit)
    ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = model(ids)
    assert len(whole.state.window) == 3 * 2
    logits, state = [], None
    for token in ids.split(1, dim=1):
        out = model(token, state)
        logits.append(out.logits)
        state = out.state
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits)
    torch.testing.assert_close(model.consolidate(ids), whole.state)
    model.loss(ids, torch.ones_like(ids, dtype=torch.bool))


def test_the_exit_gate_is_read_in_order() -> None:
    model = tiny_ouro(exit={"threshold": None, "weighted": True})
    states = torch.randn(5, 3, 16, dtype=torch.float64)
    chances = model.exit.chances(states)
    torch.testing.assert_close(chances.sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(model.exit(states), (chances[..., None] * states).sum(1))
    assert torch.equal(tiny_ouro(exit={"loop": 1}).exit(states), states[:, 1])
    assert torch.equal(tiny_ouro(exit={"threshold": None}).exit(states), states[:, 2])
    gate = tiny_ouro(exit={"threshold": 0.5}).exit
    first = (gate.chances(states).cumsum(-1) >= 0.5).int().argmax(-1)
    assert torch.equal(gate(states), states[torch.arange(5), first])


@torch.no_grad()
def test_packed_sequences_of_looped_models_and_learned_positions() -> None:
    ids, ends = torch.randint(0, 11, (1, 12), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, 8, 12])
    learned = {"layers": "attn gdn", "wake_loops": 1, "evict": "hard", "window": 9, "learned_positions": True}
    for model in (tiny_ouro(exit={"threshold": 0.4}), tiny_ouro(**learned, blocks={"gdn": {"heads": 2}})):
        out = model(ids, cu_seqlens=ends)
        further = model(ids[0, :3, None], out.state).logits
        for s in range(3):
            alone = model(ids[:, ends[s] : ends[s + 1]])
            torch.testing.assert_close(out.logits[:, ends[s] : ends[s + 1]], alone.logits)
            torch.testing.assert_close(further[s : s + 1], model(ids[:, s : s + 1], alone.state).logits)


def test_packed_sequences_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.create("gdn4-sleep2-hard6", d_model=16, vocab_size=11)
    ids = torch.zeros(1, 12, dtype=torch.int64)
    for ends in ([0, 6], [0, 6, 6, 12], [1, 12], [12], [0, 13]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            model(ids, cu_seqlens=torch.tensor(ends))
    with pytest.raises(ValueError, match="one row"):
        model(ids.expand(2, 12), cu_seqlens=torch.tensor([0, 12]))
    with pytest.raises(zoo.ZooError, match="7 tokens do not fit into a window of 6"):
        model(ids, cu_seqlens=torch.tensor([0, 5, 12]))
    with pytest.raises(zoo.ZooError, match="7 tokens are more than one window of 6"):
        zoo.create("gdn4-sleep2-slide6", d_model=16, vocab_size=11).consolidate(ids, cu_seqlens=torch.tensor([0, 5, 12]))
    state = model(ids, cu_seqlens=torch.tensor([0, 6, 12])).state
    with pytest.raises(zoo.ZooError, match="consolidate it first"):
        model(ids[:, :2], state, cu_seqlens=torch.arange(3))
    monkeypatch.setattr(type(model.blocks[1].mixer), "packs", False)
    with pytest.raises(zoo.ZooError, match="block 'gdn' does not support packed sequences"):
        model(ids, cu_seqlens=torch.tensor([0, 6, 12]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": "attn gdn"}, "wake_loops: 3 needs blocks without fast weights"),
        ({"loops": 2}, "wake_loops: 3 loops while awake"),
        ({"span": (0, 0)}, "wake_loops: 3 loops while awake"),
        ({"evict": "sliding", "window": 4}, "wake_loops: 3 loops while awake"),
        ({"exit": {"loop": 3}}, "exit.loop: 3 is not one of the 3 wake loops"),
        ({"exit": {"steps": 3}}, "exit.steps: unknown field"),
        ({"norm": "layer"}, "norm: 'layer'"),
        ({"blocks": {"attn": {"heads": 3}}}, "heads: 3 does not divide d_model: 16"),
        ({"blocks": {"attn": {"rotary": 2}}}, "rotary: 2"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        tiny_ouro(**fields)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ("mamba2", {"head_dim": 7}, "head_dim: 7 does not divide the 32 inner channels"),
        ("mamba2", {"head_dim": 8, "groups": 3}, "groups: 3 does not divide the 4 heads"),
        ("mamba2", {"head_dim": 8, "dt_limit": [1, 0]}, "dt_limit"),
        ("gdn", {"heads": 2, "value_heads": 3}, "value_heads: 3 is not a multiple of heads: 2"),
        ("jet", {"head": 2}, "blocks.jet: head: unknown field; did you mean 'heads'"),
    ],
)
def test_bad_options(layers: str, options: dict, message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        zoo.create({"name": "tiny", "vocab_size": 11, "d_model": 16, "layers": layers, "blocks": {layers: options}})


def test_init() -> None:
    model = zoo.create(
        {"name": "tiny", "vocab_size": 11, "d_model": 64, "layers": "jet mamba mamba2", "blocks": {"jet": {"inserted": True}}}
    )
    jet, mamba, mamba2 = (block.mixer for block in model.blocks)
    assert not jet.o_proj.weight.any()
    assert not jet.kernel_out.weight.any()
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    for bias in (jet.dt_bias, mamba.dt_proj.bias, mamba2.dt_bias):
        step = torch.nn.functional.softplus(bias)
        assert 0.9e-3 <= step.min() <= step.max() <= 0.11
    assert mamba.dt_proj.weight.abs().max() <= 0.5  # dt_rank ** -0.5
    again = zoo.create(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

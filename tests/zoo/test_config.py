"""Names, layer patterns and configs, and the errors for wrong ones."""

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.config import merge, parse_overrides, resolve
from zoo.layer_pattern import expand


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("attn", ["attn"]),
        ("attn gdn", ["attn", "gdn"]),
        ("jet*3 attn", ["jet", "jet", "jet", "attn"]),
        ("(attn gdn)*2", ["attn", "gdn"] * 2),
        ("a (b (c d)*2 e)*2", ["a", *["b", "c", "d", "c", "d", "e"] * 2]),
        ("  a*2\n b ", ["a", "a", "b"]),
        ("(a*2)*3", ["a"] * 6),
        ("my-block_2", ["my-block_2"]),
    ],
)
def test_pattern(pattern, names):
    assert expand(pattern) == tuple(names)


_patterns = st.recursive(
    st.sampled_from(["attn", "gdn", "swa"]).map(lambda n: (n, [n])),
    lambda items: st.one_of(
        st.lists(items, min_size=1, max_size=3).map(
            lambda xs: ("(" + " ".join(x[0] for x in xs) + ")", [name for x in xs for name in x[1]])
        ),
        st.tuples(items, st.integers(1, 3)).map(lambda x: (f"({x[0][0]})*{x[1]}", x[0][1] * x[1])),
    ),
    max_leaves=8,
)


@given(_patterns)
def test_any_pattern(pattern):
    text, names = pattern
    assert expand(text) == tuple(names)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("attn (gdn", r"character 10: '\(' is never closed"),
        ("attn) gdn", r"character 5: '\)' without '\('"),
        ("*2 attn", "character 1: '\\*' must follow"),
        ("(*2 attn)", "character 2: '\\*' must follow"),
        ("attn ()", "empty parentheses"),
        ("attn*0", "count must be at least 1"),
        ("attn*99999", "at most 10000 layers"),
        ("attn, gdn", "character 5: want a block name"),
        ("attn*x", "character 5"),
        ("attn*2*3", "character 7: '\\*' must follow"),
    ],
)
def test_wrong_pattern(pattern, message):
    with pytest.raises(zoo.ZooError, match=f"layers: .*{message}"):
        expand(pattern)


@pytest.mark.parametrize(
    ("name", "loops", "evict", "window"),
    [
        ("gdn4", 1, "none", None),
        ("gdn4-sleep4", 4, "hard", 24),
        ("gdn4-sleep12-hard7", 12, "hard", 7),
        ("gdn4-sleep2-slide512", 2, "sliding", 512),
        ("gdn4-hard9", 1, "hard", 9),
        ("gdn4-slide9", 1, "sliding", 9),
        ("gdn4-sleep3-full", 3, "none", None),
        ("gdn4-full", 1, "none", None),
    ],
)
def test_suffixes(name, loops, evict, window):
    config = resolve(name)
    assert (config.name, config.loops, config.evict, config.window) == (name, loops, evict, window)


def test_overrides_are_merged():
    config = resolve("gdn4-sleep4", {"d_model": 64, "blocks": {"gdn": {"heads": 2}}})
    assert config.blocks == {"attn": {"heads": 4}, "gdn": {"heads": 2, "expand_v": 2}}
    assert config.d_model == 64


def test_evict_none_drops_the_window():
    assert resolve("gdn4-sleep4", {"evict": "none"}).window is None


def test_parse_overrides():
    assert parse_overrides(["d_model=128", "blocks.gdn.heads=2", "blocks.gdn.expand_v=1.5", "span=[1, 2]", "layers=attn gdn"]) == {
        "d_model": 128,
        "blocks": {"gdn": {"heads": 2, "expand_v": 1.5}},
        "span": [1, 2],
        "layers": "attn gdn",
    }
    for wrong in ("d_model", "=3", "a..b=1", "x=[1"):
        with pytest.raises(zoo.ZooError, match=r"field=value|YAML"):
            parse_overrides([wrong])


_overrides = st.fixed_dictionaries(
    {},
    optional={
        "d_model": st.sampled_from([16, 32]),
        "layers": st.sampled_from(["attn gdn", "(gdn swa)*2", "gdn"]),
        "d_ff": st.integers(1, 40),
        "norm_eps": st.sampled_from([1e-5, 3e-6]),
        "tie_embeddings": st.booleans(),
        "loops": st.integers(1, 4),
        "inject": st.booleans(),
        "residual_gates": st.integers(0, 2),
        "loop_norm": st.booleans(),
        "sleep_on": st.sampled_from(["unsupervised", "every"]),
        "blocks": st.fixed_dictionaries({}, optional={"gdn": st.just({"heads": 2}), "swa": st.just({"window": 5, "kv_heads": 2})}),
        "about": st.text(max_size=30),
    },
)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["gdn4", "gdn4-sleep4", "gdn4-slide8", "gdn4-sleep2-hard5"]), _overrides)
def test_round_trip(tmp_path_factory, name, overrides):
    """describe -> YAML -> the same model."""
    description = zoo.describe(name, **overrides)
    path = tmp_path_factory.mktemp("yaml") / "model.yaml"
    path.write_text(description.config.yaml(), encoding="utf-8")
    again = zoo.describe(path)
    assert again == description
    assert resolve(yaml.safe_load(path.read_text(encoding="utf-8"))) == description.config


def test_same_seed_same_weights():
    first, second, other = (zoo.create("gdn4", d_model=16, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_creating_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    zoo.create("gdn4", d_model=16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gdn5", {}, "unknown model 'gdn5'; did you mean 'gdn4'"),
        ("gdn5-sleep4", {}, "unknown model 'gdn5-sleep4'; did you mean 'gdn4'"),
        ("gpt2", {}, r"unknown model 'gpt2'; allowed: (\S+, ){4}\S+ and \d+ others; see `zoo list`$"),
        ("gdn4-slep4", {}, "unknown suffix '-slep4'; allowed: -sleep<N>"),
        ("gdn4-sleep", {}, "unknown suffix '-sleep'"),
        ("gdn4-full3", {}, "unknown suffix '-full3'"),
        ("gdn4-hard24-sleep2", {}, "'-sleep2' is out of order"),
        ("gdn4-hard24-slide2", {}, "'-slide2' is out of order"),
        ("gdn4-sleep0", {}, "loops: 0: .*greater than or equal to 1"),
        ("gdn4-hard0", {}, "window: 0: .*greater than or equal to 1"),
        ("gdn4", {"loops": 0}, "loops: 0"),
        ("gdn4", {"d_modell": 3}, "d_modell: unknown field; did you mean 'd_model'"),
        ("gdn4", {"d_model": "wide"}, "d_model: 'wide'"),
        ("gdn4", {"inject": "foo"}, "gdn4: inject: 'foo': want true or false, or 'bounded'$"),
        ("gdn4", {"layers": "attn gdm"}, "gdn4: layers: unknown block 'gdm'; did you mean 'gdn'"),
        ("gdn4", {"blocks": {"gdm": {}}}, "gdn4: blocks: unknown block 'gdm'"),
        ("gdn4", {"blocks": {"gdn": {"heds": 2}}}, "blocks.gdn: heds: unknown field; did you mean 'heads'"),
        ("gdn4", {"blocks": {"gdn": {"heads": 3}}}, "heads: 3 does not divide d_model: 256"),
        ("gdn4", {"blocks": {"attn": {"heads": 3}}}, "heads: 3 does not divide d_model: 256"),
        ("gdn4", {"blocks": {"attn": {"heads": 4, "kv_heads": 3}}}, "kv_heads: 3 does not divide heads: 4"),
        ("gdn4", {"blocks": {"attn": {"head_dim": 5}}}, "head_dim: 5 must be even"),
        ("gdn4", {"blocks": {"attn": {"rotary": 0.01}}}, "rotary: 0.01 of head_dim 64 is less than one entry"),
        ("gdn4", {"blocks": {"attn": {"rope_theta": 0.5}}}, "rope_theta: 0.5: must be greater than or equal to 1"),
        ("gdn4", {"blocks": {"attn": {"rope_scaling": {"type": "linear", "factor": 0.25}}}}, "factor: 0.25: must be greater than or equal"),
        ("gdn4", {"blocks": {"gdn": {"expand_v": 0.001}}}, "expand_v: 0.001 times 64, the size of a key head, is less than one entry"),
        ("gdn4", {"layers": "kda", "blocks": {"kda": {"expand_v": 0.001}}}, "expand_v: 0.001 times 64"),
        ("gdn4", {"mlp": "swiglu*0"}, r"^mlp: 'swiglu\*0' at character 7: count must be"),
        ("gdn4", {"mlp": ""}, "^mlp: the pattern is empty"),
        ("gdn4-sleep2", {"feed_back": False, "inject": True}, "inject: True changes what a pass gets from the previous one; feed_back"),
        ("gdn4-sleep2", {"feed_back": False, "loop_norm": True}, "loop_norm: True changes what a pass gets"),
        ("gdn4-sleep" + "9" * 5000, {}, "^gdn4-sleep9{500}"),
        ("gdn4-sleep4", {"span": [2, 4]}, r"span: \[2, 4\] lies outside the layers 0 to 3"),
        ("gdn4-sleep4", {"span": [2, 1]}, r"span: \[2, 1\]: the first layer is after the last"),
        ("gdn4-sleep4", {"span": [-1, 1]}, r"span: \[-1, 1\] lies outside"),
        ("gdn4", {"evict": "hard"}, "window: evict 'hard' needs"),
        ("gdn4", {"span": []}, r"span: \[\]: want|span\.0: is missing"),
        ("gdn4", {"layers": "attn", "mlp": "swiglu*2"}, "mlp: 2 MLPs for 1 layer; want"),
        ("gdn4", {"window": 8}, "window: 8 is not used under evict 'none'"),
        ("gdn4", {"evict": "slide"}, "gdn4: evict: unknown eviction policy 'slide'; did you mean 'sliding'"),
        ("gdn4-sleep2-slide8", {"learned_positions": True}, "learned_positions: windows under evict 'sliding' do not restart"),
        ("gdn4-sleep2", {"layers": "attn*2"}, "evict: 'hard' empties the window, and no block of 'attn\\*2' has fast weights"),
        ("nowhere.yaml", {}, "nowhere.yaml: No such file"),
    ],
)
def test_wrong_input(name, overrides, message):
    with pytest.raises(zoo.ZooError, match=message) as caught:
        zoo.create(name, **overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vocab_size: 3\nd_model: 8\nlayers: gdn\nnam: x", "nam: unknown field; did you mean 'name'"),
        ("vocab_size: 3\nlayers: gdn\nname: x", "d_model: is missing"),
        ("- a list", "want a mapping"),
        ("a: [1", "not YAML"),
        ("d_model: 8\nblocks:\n  gdn: {heads: 2,\n    heads: 4}", "not YAML: duplicate field 'heads' in line 4, column 5"),
        ("name: !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_wrong_file(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(zoo.ZooError, match=message) as caught:
        zoo.create(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_model_in_the_zoo(name):
    """Every shipped config is valid, also with sleep, and has a description."""
    for variant in (name, f"{name}-sleep2"):
        config = resolve(variant)
        assert config.about
        model = zoo.create(variant, device="meta")
        assert model.config == config
    assert resolve(f"{name}-sleep2").evict != "none"


def test_dates_are_text():
    """In JSON, too, there is no other form of them; a folder may have such a name."""
    assert parse_overrides(["weights=2026-11-30", "base.steps=3", "grid={a: [2026-11-30 10:00:00]}"]) == {
        "weights": "2026-11-30",
        "base": {"steps": 3},
        "grid": {"a": ["2026-11-30 10:00:00"]},
    }


def test_merge_leaves_its_arguments_alone():
    fields = {"blocks": {"gdn": {"heads": 4}}}
    assert merge(fields, {"blocks": {"gdn": {"heads": 2}}}) == {"blocks": {"gdn": {"heads": 2}}}
    assert fields == {"blocks": {"gdn": {"heads": 4}}}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["norm_eps", "embed_scale", "blocks.gdn.norm_eps", "blocks.attn.rope_theta", "mlps.swiglu.scale"])
def test_numbers_are_finite(where, value):
    given = value
    for name in reversed(where.split(".")):
        given = {name: given}
    with pytest.raises(zoo.ZooError, match=f"{where.split('.')[-1]}: {value}: want a finite number"):
        zoo.create("gdn4-sleep1", **given)

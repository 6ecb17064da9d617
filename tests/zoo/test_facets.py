"""The list of models: every facet against the YAML files and the published numbers of parameters."""

import re
from pathlib import Path

import pytest
import yaml

import zoo
from tests.zoo.test_models import PARAMETERS
from zoo.checkpoints import plain

FILES = sorted((Path(__file__).parents[2] / "configs" / "models").glob("*.yaml"), key=lambda file: file.stem)
CONFIGS = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in FILES}
FAMILIES = {name: config.get("upstream", {}).get("model_type") for name, config in CONFIGS.items()}
MADE_OF = {"parallel": {"attn", "mamba2"}}
MIXERS = {
    name: {part for kind in re.findall(r"[a-z]\w*", config["layers"]) for part in {kind} | MADE_OF.get(kind, set())}
    for name, config in CONFIGS.items()
}


def test_wildcard():
    assert zoo.list_models() == sorted(CONFIGS)
    assert zoo.list_models("gdn*") == ["gdn0.4b", "gdn1.3b", "gdn4"]
    assert zoo.list_models("nothing*") == []


@pytest.mark.parametrize("family", sorted(set(FAMILIES.values()) - {None}))
def test_family(family):
    assert zoo.list_models(family=family) == [name for name in sorted(CONFIGS) if FAMILIES[name] == family]


@pytest.mark.parametrize("mixer", sorted(set().union(*MIXERS.values())))
def test_mixer(mixer):
    assert zoo.list_models(mixer=mixer) == [name for name in sorted(CONFIGS) if mixer in MIXERS[name]]


def test_sleeps():
    without = {"attn", "swa", "conv"}
    assert zoo.list_models(sleeps=True) == [name for name in sorted(CONFIGS) if MIXERS[name] - without]


@pytest.mark.parametrize("name", ["ouro1.4b", "ourojet1.4b", "lfm2-350m"])
def test_what_does_not_sleep_is_refused(name):
    if zoo.list_models(name, sleeps=True):
        assert zoo.create(f"{name}-sleep2-hard8", device="meta").config.loops == 2
    else:
        with pytest.raises(zoo.ZooError, match="has fast weights"):
            zoo.create(f"{name}-sleep2-hard8", device="meta")


@pytest.mark.parametrize(
    ("params", "low", "high"),
    [
        ("1b..4b", 1e9, 4e9),
        ("0.7B..", 700e6, 1e12),
        ("..500m", 0, 500e6),
        ("354483.968k..1.170340608b", 354_483_968, 1_170_340_608),  # the ends are included
        ("354483969..0.1t", 354_483_969, 1e11),
    ],
)
def test_params(params, low, high):
    published = {name: number for name, number in PARAMETERS.items() if name.startswith("lfm2")}
    assert zoo.list_models("lfm2*", params=params) == sorted(name for name, number in published.items() if low <= number <= high)


@pytest.mark.parametrize("params", ["", "..", "3b", "b..", "1b...3b", "1x..", "-1b..3b", "1e9..", "1b..3b..", "3b..1b", 3])
def test_wrong_params(params):
    with pytest.raises(zoo.ZooError, match=r"^params: "):
        zoo.list_models("gdn*", params=params)


def test_facets_are_combined(monkeypatch):
    """And only the models that the other facets allow are built."""
    built = []
    monkeypatch.setattr(plain, "empty_model", lambda config, make=plain.empty_model: built.append(config.name) or make(config))
    hybrids = [f"granite4-h-{size}" for size in ("1b", "350m", "micro", "small", "tiny")]
    assert zoo.list_models("granite*", mixer="mamba2", sleeps=True, family="granitemoehybrid") == hybrids
    assert built == []
    assert zoo.list_models("*b", family="granitemoehybrid", mixer="mamba2", params="1b..") == ["granite4-h-1b"]
    assert built == ["granite4-h-1b"]


def test_unknown_names():
    assert zoo.list_models(family="llama") == []  # it has no shipped config
    with pytest.raises(zoo.ZooError, match=r"family: 'nothing' is unknown; allowed: .* and \d+ others$"):
        zoo.list_models("gdn*", family="nothing")
    with pytest.raises(zoo.ZooError, match="mixer: 'gnd' is unknown; did you mean 'gdn'"):
        zoo.list_models(mixer="gnd")

"""Saving models that are compiled, wrapped, parametrised, resized or adapted: `zoo.load` reads them, or they are refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import zoo

ORACLES = Path(__file__).parents[2] / "data" / "oracles"
IDS = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(0))


def small(**fields) -> zoo.Model:
    return zoo.create("gdn4-sleep2-hard16", layers="attn gdn", vocab_size=64, d_model=32, **fields)


def compiled_block(model: zoo.Model) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def distributed(model: zoo.Model) -> nn.Module:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


def parametrised(model: zoo.Model) -> nn.Module:
    for module in (model.head, model.blocks[0].mixer.q_proj, model.blocks[1].mlp.up_proj):
        weight_norm(module)
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(1.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("format", ["zoo", "hf"])
@pytest.mark.parametrize(
    "change", [lambda model: torch.compile(model, backend="eager"), compiled_block, DataParallel, distributed, parametrised]
)
def test_what_is_saved_is_what_is_loaded(change: Callable[[zoo.Model], nn.Module], format: str, tmp_path: Path) -> None:
    model = small(upstream={"model_type": "gated_deltanet"}, norm_eps=1e-5)
    changed = change(model)
    zoo.save(changed, tmp_path / "x", format=format)
    loaded = zoo.load(tmp_path / "x")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    assert not any("_orig_mod" in name or "param" in name for name in loaded.state_dict())


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight
        self.A = nn.Linear(base.in_features, 2)


class Quantised(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach().to(torch.uint8))


class Subclass(torch.Tensor):
    pass


def resized(model: zoo.Model) -> None:
    model.embed, model.head = nn.Embedding(80, 32), nn.Linear(32, 80, bias=False)


def adapted(model: zoo.Model) -> None:
    model.blocks[0].mixer.q_proj = Adapter(model.blocks[0].mixer.q_proj)


def quantised(model: zoo.Model) -> None:
    model.head = Quantised(model.head)


def subclassed(model: zoo.Model) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().as_subclass(Subclass))


def without_norm(model: zoo.Model) -> None:
    model.norm = nn.Identity()


@pytest.mark.parametrize("format", ["zoo", "hf"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resized, r"'embed.weight' is \[80, 32\], its config has \[64, 32\]"),
        (adapted, r"'blocks.0.mixer.q_proj.A.bias' is not part of its config \(\d such tensors\); merge adapters first"),
        (quantised, "'head.weight' is torch.uint8; want a floating-point dtype"),
        (subclassed, "'head.weight' is a Subclass; gather or dequantise it first"),
        (without_norm, "'norm.weight' is missing"),
        (lambda model: model.to("meta"), "is on the meta device"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(change: Callable, message: str, format: str, tmp_path: Path) -> None:
    model = small(upstream={"model_type": "gated_deltanet"}, norm_eps=1e-5)
    change(model)
    with pytest.raises(zoo.ZooError, match=message) as caught:
        zoo.save(model, tmp_path / "x", format=format)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_modules_are_not_saved(tmp_path: Path) -> None:
    for other in (nn.Linear(2, 2), DataParallel(nn.Linear(2, 2)), 3):
        with pytest.raises(zoo.ZooError, match=f"a {type(other).__name__} holds no model"):
            zoo.save(other, tmp_path / "x")


@torch.no_grad()
@pytest.mark.parametrize("name", ["gdn-qwen3_5-a", "jet-nemotron-a", "llama-swa-a"])
def test_sleep_settings_survive_the_upstream_format(name: str, tmp_path: Path) -> None:
    settings = {"loops": 3, "evict": "sliding", "window": 8, "span": (1, 2), "sleep_on": "every", "carry": False, "loop_norm": True}
    model = zoo.load(ORACLES / name, **settings)
    assert {field: getattr(model.config, field) for field in settings} == settings
    zoo.save(model, tmp_path / "once", format="hf")
    again = zoo.load(tmp_path / "once")
    assert {field: getattr(again.config, field) for field in settings} == settings
    ids = torch.arange(8)[None]
    for a, b in zip(model.consolidate(ids).fast, again.consolidate(ids).fast, strict=True):
        assert a is b is None or torch.equal(a, b)
    awake = zoo.load(tmp_path / "once", loops=1, evict="none", span=None, sleep_on="unsupervised", carry=True, loop_norm=False)
    zoo.save(awake, tmp_path / "twice", format="hf")
    assert (tmp_path / "twice" / "config.json").read_text().split() == (ORACLES / name / "config.json").read_text().split()


@pytest.mark.parametrize("sleep", [{"lops": 3}, {"loops": 0}, {"evict": "soft"}, {"evict": "hard"}, 3, {"loops": "many"}])
def test_sleep_settings_that_do_not_fit(sleep: object, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(ORACLES / "llama-swa-a", tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sleep": sleep}))
    with pytest.raises(zoo.ZooError, match=r"sleep|loops|soft|window"):
        zoo.load(folder)
    with pytest.raises(zoo.ZooError, match=re.escape("did you mean 'loops'")):
        zoo.load(ORACLES / "llama-swa-a", lops=3)

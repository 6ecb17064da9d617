"""Weights stored by columns: nothing but strides and rounding changes."""

import copy
import json

import pytest
import torch
from torch import nn

import zoo
from zoo import products
from zoo.blocks import linear

IDS = torch.randint(11, (1, 20), generator=torch.Generator().manual_seed(0))
BLOCKS = {"attn": {"heads": 2}, "gdn": {"heads": 2}, "mamba2": {"head_dim": 8, "state_dim": 8, "bias": True}}


@pytest.fixture(autouse=True)
def by_columns(monkeypatch):
    monkeypatch.setattr(products, "by_columns_is_faster", lambda: True)
    monkeypatch.setattr(linear, "SMALLEST", 0)


def small(**fields):
    layers = {"layers": "attn gdn mamba2", "blocks": BLOCKS, "d_model": 32, "d_ff": 16, "vocab_size": 11}
    return zoo.create("gdn4-sleep2-hard8", **{**layers, **fields})


def arranged(model):
    twin = copy.deepcopy(model)
    assert zoo.arrange_weights(twin)
    return twin


def strided(model):
    return {name for name, weight in model.named_parameters() if not weight.is_contiguous()}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_sessions_and_pools_compute_the_same(tied):
    plain = small(tie_embeddings=tied)
    ours, exact = arranged(plain), copy.deepcopy(plain).double()
    linears = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert strided(ours) == linears | ({"embed.weight"} if tied else set())
    want = zoo.Session(exact).feed(IDS)
    error = [(zoo.Session(model).feed(IDS) - want).norm() / want.norm() for model in (plain, ours)]
    assert error[1] < 2 * error[0] + 1e-6
    answer = list(zoo.Session(plain).generate(IDS, 12))
    assert list(zoo.Session(ours).generate(IDS, 12)) == answer
    with zoo.SessionPool(ours) as pool:
        assert list(pool.open().generate(IDS, 12)) == answer


def content(file):
    """Header and data of a safetensors file; the order of its metadata is random."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_weights_are_held_once_and_files_are_plain(tmp_path):
    plain = small()
    ours = arranged(plain)
    assert sum(p.untyped_storage().nbytes() for p in ours.parameters()) == sum(p.nbytes for p in plain.parameters())
    assert all(torch.equal(ours.get_parameter(name), weight) for name, weight in plain.named_parameters())
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, model in {"plain": plain, "ours": ours}.items():
        zoo.save(model, tmp_path / name)
    assert content(tmp_path / "plain" / "model.safetensors") == content(tmp_path / "ours" / "model.safetensors")
    zoo.Session(ours).save(tmp_path / "stream")
    zoo.Session(plain).load(tmp_path / "stream")  # which compares fingerprints


@torch.no_grad()
def test_changed_replaced_and_hooked_modules_take_effect():
    plain = small()
    ours = arranged(plain)
    for model in (plain, ours):
        model.blocks[0].mixer.q_proj.weight.mul_(2)
        model.blocks[1].mixer.o_proj.load_state_dict({"weight": torch.eye(model.blocks[1].mixer.o_proj.in_features)[:32]})
        model.blocks[2].mlp.up_proj = nn.Linear(32, 16, bias=False).requires_grad_(False)
        model.blocks[2].mlp.up_proj.weight.fill_(0.1)
        model.blocks[0].mlp.down_proj.register_forward_hook(lambda module, args, out: 3 * out)
    torch.testing.assert_close(zoo.Session(ours).feed(IDS), zoo.Session(plain).feed(IDS))


def test_training_computes_the_same_gradients():
    plain = small()
    ours, mask = arranged(plain), torch.arange(20).expand(1, 20) >= 8
    for model in (plain, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.loss(IDS, mask).backward()
        optimizer.step()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, weight.grad, rtol=1e-4, atol=1e-6)
    assert strided(ours)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.bfloat16(),
        lambda model: model.share_memory(),
        lambda model: [nn.utils.parametrizations.weight_norm(m) for m in list(model.modules()) if isinstance(m, nn.Linear)],
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True),
    ],
    ids=["bfloat16", "shared", "parametrised", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_weights_stay_as_they_are(change):
    model = small()
    nn.init.normal_(model.blocks[1].mixer.b_proj.weight)
    change(model)
    want = zoo.Session(model).feed(IDS)
    zoo.arrange_weights(model)
    assert not strided(model)
    assert torch.equal(zoo.Session(model).feed(IDS), want)


def test_a_model_arranged_in_inference_mode_can_be_trained():
    model = small()
    with torch.inference_mode():
        assert zoo.arrange_weights(model)
    model(IDS[:, :8], model.init_state(1)).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_model_made_in_inference_mode_stays_as_it_is():
    with torch.inference_mode():
        model = small()
        zoo.arrange_weights(model)
    assert not strided(model)
    with torch.no_grad():
        zoo.Session(model).feed(IDS)


@pytest.mark.parametrize("model", [None, "gdn4", {}, nn.Linear])
def test_what_is_not_a_model_is_refused(model):
    with pytest.raises(zoo.ZooError, match=r"model: .*; want a torch\.nn\.Module"):
        zoo.arrange_weights(model)


def test_compiled_sessions_read_weights_by_rows():
    plain = small()
    twin = arranged(plain)
    for _ in range(2):
        assert not zoo.arrange_weights(twin, compile=True)
        assert not strided(twin)
        assert [type(module) for module in twin.modules()] == [type(module) for module in plain.modules()]
    for name, weight in twin.named_parameters():
        assert torch.equal(weight, dict(plain.named_parameters())[name])
    with products.fast_decoding(twin):
        assert strided(twin)
    with products.fast_decoding(twin, compile=True):
        assert not strided(twin)


def test_layouts_are_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(products, "BY_COLUMNS", 1e9)
    model = small()
    assert not zoo.arrange_weights(model)
    assert not strided(model)

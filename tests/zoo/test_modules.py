"""Every submodule is called, so hooks, adapters, parametrisations and replaced or quantised Linears take effect."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import zoo

BLOCKS = {
    **{kind: {"heads": 2} for kind in ("attn", "jet")},
    "gdn": {"heads": 2, "write_bias": True},
    "mamba": {"state_dim": 8},
    "mamba2": {"head_dim": 8, "state_dim": 8},
    "swa": {"heads": 2, "window": 5, "gate": True, "bias": True, "qk_norm": "plain"},
}
FIELDS = {"name": "small", "vocab_size": 64, "d_model": 32, "d_ff": 32, "layers": " ".join(BLOCKS), "blocks": BLOCKS}
IDS = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))


def small(**fields) -> zoo.Model:
    return zoo.create({**FIELDS, "evict": "hard", "window": 8, "loops": 2, **fields})


def replace_linears(module: nn.Module, new: Callable[[nn.Module], nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) or name == "head":
            setattr(module, name, new(child))
        else:
            replace_linears(child, new)


class Adapter(nn.Module):
    """A low-rank adapter beside the module it wraps."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("tied", [False, True])
def test_every_submodule_is_called(tied: bool) -> None:
    model, called = small(tie_embeddings=tied), set()
    modules = {name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)}
    assert {"head", "norm", "blocks.1.mixer.o_norm", "blocks.5.mixer.q_norm", "blocks.0.mlp.down_proj"} <= modules
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    model(IDS[:, :8])
    assert called == modules


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_every_linear_is_trained(tied: bool) -> None:
    model = small(tie_embeddings=tied)
    replace_linears(model, Adapter)
    out = model(IDS[:, :8])
    torch.testing.assert_close(out.logits, model.head(model.norm(model.wake(IDS[:, :8])[0])))
    model.loss(IDS, torch.arange(20).expand(1, 20) >= 8).backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert len(adapters) > 40
    assert all(part.weight.grad is not None and part.weight.grad.any() for adapter in adapters for part in (adapter.down, adapter.up))


def by_torch(model: zoo.Model) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def by_torchao(model: zoo.Model) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def by_bitsandbytes(model: zoo.Model) -> None:
    from bitsandbytes.nn import Linear4bit

    def new(base: nn.Module) -> nn.Module:
        made = Linear4bit(base.in_features, base.out_features, base.bias is not None, torch.float32, quant_type="nf4")
        made.load_state_dict(base.state_dict())
        return made

    replace_linears(model, new)
    model.to("cpu")  # where it quantises


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("quantise", "error"),
    [
        (by_torch, 0.1),
        pytest.param(by_torchao, 0.1, marks=pytest.mark.extended),
        pytest.param(by_bitsandbytes, 0.5, marks=pytest.mark.extended),
    ],
)
def test_linears_quantised_by_other_packages(tmp_path: Path, quantise: Callable[[zoo.Model], None], error: float) -> None:
    model = small(d_model=64, d_ff=64)
    nn.init.normal_(model.get_parameter("blocks.1.mixer.kernel_out.weight"), std=0.1, generator=torch.Generator().manual_seed(0))
    quantised = copy.deepcopy(model)
    quantise(quantised)
    want, got = (zoo.Session(each).feed(IDS) for each in (model, quantised))
    assert 1e-4 < (got - want).norm() / want.norm() < error
    session = zoo.Session(quantised)
    alone = torch.stack(list(session.generate(IDS, tokens=6)))
    with zoo.SessionPool(quantised) as pool:
        assert torch.equal(torch.stack(list(pool.open().generate(IDS, tokens=6))), alone)
    session.save(tmp_path / "stream")
    again = zoo.Session(quantised).load(tmp_path / "stream")
    assert all(map(torch.equal, again.generate(None, tokens=4), session.generate(None, tokens=4)))
    with pytest.raises(zoo.ZooError, match="weights"):
        zoo.Session(model).load(tmp_path / "stream")


@torch.no_grad()
def test_parametrised_linears() -> None:
    model = small()
    nn.init.normal_(model.get_parameter("blocks.1.mixer.kernel_out.weight"))  # a zero weight has no norm
    want = model(IDS[:, :8]).logits
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        weight_norm(module)
    torch.testing.assert_close(model(IDS[:, :8]).logits, want)


@torch.no_grad()
def test_a_tied_head_follows_the_embedding() -> None:
    model = small(tie_embeddings=True)
    assert not any(name.startswith("head") for name in model.state_dict())
    other = copy.deepcopy(model)
    other.embed = nn.Embedding(80, 32)
    assert other(IDS[:, :8]).logits.shape[-1] == 80
    assert torch.equal(other.head.weight, other.embed.weight)
    assert torch.equal(model.head.weight, model.embed.weight)


@torch.no_grad()
def test_wider_parameters_beside_narrow_weights() -> None:
    """Norms and decays in float32, everything else in bfloat16: nearer to float32 than all in bfloat16."""
    exact = small()
    narrow = copy.deepcopy(exact).bfloat16()
    mixed = copy.deepcopy(narrow)
    for name, parameter in mixed.named_parameters():
        if "norm" in name or name.endswith(("A_log", "dt_bias", "D")):
            parameter.data = exact.get_parameter(name).clone()
    ids = torch.randint(64, (64, 8), generator=torch.Generator().manual_seed(0))  # the errors of a single row differ by a fifth
    out = mixed(ids)
    assert out.logits.dtype == torch.bfloat16
    assert {x.dtype for cache in out.state.window for x in cache} == {torch.bfloat16}
    want = exact(ids).logits
    assert (out.logits - want).norm() < 1.05 * (narrow(ids).logits - want).norm()


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_by_name(name: str) -> None:
    model = zoo.create(FIELDS, dtype=name)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in wide} == {torch.bfloat16}
    assert all(re.search(r"norm[._]weight$|A_log$|dt_bias$|\.D$", name) for name in wide), wide
    assert zoo.describe(FIELDS, dtype=name).weight_bytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", ["floaty", "bfloat", "int8", torch.int64, None, 3])
def test_an_unknown_dtype(dtype) -> None:
    with pytest.raises(zoo.ZooError, match=r"dtype: '.*' is not a dtype of models; .*allowed: bfloat16, float16, float32, float64"):
        zoo.create(FIELDS, dtype=dtype)

"""Mixtures of experts against a float64 loop over tokens and experts: every router, every form of the product, idle experts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

import zoo
from zoo.blocks.mlp import mlps
from zoo.blocks.moe import MoE, MoEOptions, balance_loss, expert_loads, recorded_routes

D, F = 8, 5
ROUTERS: dict[str, dict[str, Any]] = {
    "granite": {"shared": 6},
    "qwen": {"shared": 6, "shared_gate": True},
    "nemotron": {
        **{"expert": "relu2", "score": "sigmoid", "correction": True, "normalise_eps": 1e-20, "scale": 2.5, "wide_router": True},
        **{"shared": 6, "latent": 4, "bias": True},
    },
    "lfm2": {"score": "sigmoid", "correction": True, "normalise_eps": 1e-6, "scale": 0.7},
    "jamba": {"normalise": False},
}


def make(router: str, experts: int = 6, top_k: int = 3) -> MoE:
    made = MoE(D, F, MoEOptions(experts=experts, top_k=top_k, **ROUTERS[router])).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.normal_(generator=generator)
    return made


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "inner"), [(8, 5), (6, 8), (8, 8), (7, 3)])
def test_widths_that_are_no_multiple_of_four(width: int, inner: int) -> None:
    """Without gradients, torch's own product of groups has rows of whole 16 bytes."""
    moe = MoE(width, inner, MoEOptions(experts=4, top_k=2))
    with torch.no_grad():
        for tensor in moe.state_dict().values():
            tensor.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(moe(x).double(), moe.double()(x.double()), rtol=1e-4, atol=1e-4)


def by_the_book(moe: MoE, router: str, x: Tensor) -> Tensor:
    """One token at a time, one expert at a time."""
    p, option = moe.state_dict(keep_vars=True), ROUTERS[router]

    def expert(up: Tensor, down: Tensor, row: Tensor) -> Tensor:
        if option.get("expert") == "relu2":
            return down @ relu(up @ row) ** 2
        gate, value = (up @ row).tensor_split(2)
        return down @ (silu(gate) * value)

    out = []
    for row in x.flatten(0, 1):
        logits = p["router.proj.weight"] @ row
        score = logits.sigmoid() if option.get("score") == "sigmoid" else logits.exp() / logits.exp().sum()
        rank = score + p["router.correction"] if option.get("correction") else score
        chosen = sorted(range(len(rank)), key=lambda e: -rank[e].item())[: moe.top_k]
        total = sum(score[e] for e in chosen) + option.get("normalise_eps", 0) if option.get("normalise", True) else 1
        inside = p["latent_in.weight"] @ row + p["latent_in.bias"] if "latent" in option else row
        y = sum(option.get("scale", 1) * score[e] / total * expert(p["experts.up"][e], p["experts.down"][e], inside) for e in chosen)
        y = p["latent_out.weight"] @ y + p["latent_out.bias"] if "latent" in option else y
        if "shared" in option:
            if option.get("expert") == "relu2":
                h = relu(p["shared.up_proj.weight"] @ row + p["shared.up_proj.bias"]) ** 2
                shared = p["shared.down_proj.weight"] @ h + p["shared.down_proj.bias"]
            else:
                h = silu(p["shared.gate_proj.weight"] @ row) * (p["shared.up_proj.weight"] @ row)
                shared = p["shared.down_proj.weight"] @ h
            y = y + shared * ((p["shared_gate.weight"] @ row).sigmoid() if option.get("shared_gate") else 1)
        out.append(y)
    return torch.stack(out).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("shape", [(2, 5), (3, 1), (1, 1)])
@pytest.mark.parametrize("router", ROUTERS)
def test_output_and_gradients(router: str, shape: tuple[int, int]) -> None:
    moe, x = make(router), tokens(*shape).requires_grad_()
    leaves = [x, *moe.parameters()]
    y, want = moe(x), by_the_book(moe, router, x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    grads, wanted = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, want))
    torch.testing.assert_close(grads, wanted, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 5), (3, 1)])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_forms_of_graphs(router: str, shape: tuple[int, int]) -> None:
    """Exported and transformed functions have no loop whose length depends on the tokens."""
    moe, x = make(router), tokens(*shape)
    program = torch.export.export(moe, (x,))
    other = tokens(*shape, seed=2)
    torch.testing.assert_close(program.module()(other), by_the_book(moe, router, other), rtol=1e-12, atol=1e-12)
    loss = lambda x: moe(x).square().sum()  # noqa: E731
    want = torch.autograd.grad(by_the_book(moe, router, x.requires_grad_()).square().sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), want, rtol=1e-11, atol=1e-11)


def test_experts_that_no_token_or_every_token_chooses() -> None:
    moe, x = make("lfm2", experts=5, top_k=1), tokens(2, 6).requires_grad_()
    for busy in range(5):
        with torch.no_grad():
            moe.router.correction.copy_(torch.full((5,), -9.0).scatter(0, torch.tensor(busy), 9.0))
        y, want = moe(x), by_the_book(moe, "lfm2", x)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        up, down, inputs = torch.autograd.grad(y.square().sum(), [moe.experts.up, moe.experts.down, x])
        assert [bool(rows.any()) for rows in up] == [bool(rows.any()) for rows in down] == [e == busy for e in range(5)]
        assert inputs.isfinite().all()


def test_routes_and_their_balance() -> None:
    model = zoo.create(
        {"name": "x", "vocab_size": 7, "d_model": D, "layers": "gdn*2", "mlp": "moe", "blocks": {"gdn": {"heads": 2}}, "loops": 3}
        | {"mlps": {"moe": {"experts": 4, "top_k": 2, "width": 5}}, "evict": "hard", "window": 6}
    )
    ids = torch.arange(6)[None]
    with recorded_routes() as routes:
        model.consolidate(ids)
    assert len(routes) == 3 * 2 - 1  # nothing reads the last MLP of a sleep that empties the window
    assert all(route.chances.shape == (6, 4) and route.chosen.shape == (6, 2) for route in routes)
    assert not any(torch.equal(routes[0].chances, route.chances) for route in routes[2::2])  # another route in every pass
    first, second = (model.blocks[n].mlp.router for n in range(2))
    assert [route.router for route in routes] == [first, second, first, second, first]
    assert [route.number for route in routes] == [0, 0, 1, 1, 2]
    loads = expert_loads(routes)
    assert [loads[n].shape for n in range(3)] == [(2, 4), (2, 4), (1, 4)]
    for route, load in zip(routes, [*loads[0], *loads[1], *loads[2]], strict=True):
        assert load.tolist() == [int((route.chosen == e).sum()) for e in range(4)]
    assert torch.equal(expert_loads([*routes, *routes])[1], 2 * loads[1])
    with recorded_routes() as routes:
        model(ids)
    loss = balance_loss(routes)
    loss.backward()
    gradient = model.blocks[0].mlp.router.proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    want = sum(
        4 * sum((route.chosen == e).any(-1).double().mean() * route.chances[:, e].double().mean() for e in range(4)) for route in routes
    ) / len(routes)
    torch.testing.assert_close(loss.double(), want)


def test_costs_count_chosen_experts() -> None:
    fields = {"name": "x", "vocab_size": 7, "d_model": D, "layers": "attn", "mlp": "moe", "blocks": {"attn": {"heads": 2}}}
    described = zoo.describe(fields, mlps={"moe": {"experts": 6, "top_k": 2, "width": 5, "shared": 3}})
    one = 3 * 5 * D
    assert described.parameters - described.active_parameters == 4 * one
    dense = zoo.describe(fields, mlp="none")
    assert described.flops_per_token - dense.flops_per_token == 2 * (2 * one + 3 * 3 * D + 6 * D)
    assert "active" in str(described)
    assert "active" not in str(dense)


def test_kinds_of_mlps() -> None:
    x = tokens(1, 4)
    expected = {
        "swiglu": lambda p: (silu(x @ p["gate"] + p["a"]) * (x @ p["up"] + p["b"])) @ p["down"] + p["c"],
        "gelu": lambda p: (gelu(x @ p["gate"] + p["a"], approximate="tanh") * (x @ p["up"] + p["b"])) @ p["down"] + p["c"],
        "relu2": lambda p: (x @ p["up"] + p["b"]).clamp(min=0) ** 2 @ p["down"] + p["c"],
    }
    for kind, want in expected.items():
        made = mlps.get(kind)(D, F, mlps.get(kind).Options(bias=True)).double()
        p = {name.removesuffix("_proj.weight"): x.mT for name, x in made.named_parameters() if x.ndim == 2}
        p |= {letter: made.get_parameter(f"{name}_proj.bias") for name, letter in (("gate", "a"), ("up", "b"), ("down", "c")) if name in p}
        torch.testing.assert_close(made(x), want(p))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": "moe*2"}, "mlp: 2 MLPs for 1 layer;"),
        ({"mlp": "mo"}, "mlp: unknown MLP 'mo'; did you mean 'moe'"),
        ({"mlp": "moe", "mlps": {"moe": {"experts": 2, "top_k": 3}}}, "top_k: 3 of 2 experts"),
        ({"mlp": "moe", "mlps": {"moe": {"shared_gate": True}}}, "shared_gate: there is no shared expert"),
        ({"mlps": {"swiglu": {"wdth": 3}}}, "mlps.swiglu: wdth: unknown field; did you mean 'width'"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        zoo.create({"name": "x", "vocab_size": 7, "d_model": D, "layers": "gdn", "blocks": {"gdn": {"heads": 2}}, **fields}, device="meta")


def test_initial_sizes() -> None:
    """What a mixture adds is of the size of what a dense MLP adds."""
    fields = {"name": "x", "vocab_size": 7, "d_model": 64, "layers": "attn", "d_ff": 128, "blocks": {"attn": {"heads": 2}}}
    x = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    dense, moe = (zoo.create(fields, mlp=kind).blocks[0].mlp(x).std().item() for kind in ("swiglu", "moe"))
    assert 0.3 < moe / dense < 1

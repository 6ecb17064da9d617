"""The one-launch decode step against the plain operators, and in its place in the block."""

from typing import Any

import pytest
import torch

import zoo
from tests.kernels.checking import Fences, fenced, relative
from tests.kernels.interpreter import rehearse
from zoo.kernels.gdn_step.op import gdn_step, one_launch
from zoo.kernels.tuning import forced

SIZES = {  # H, HV, K, V, taps, gated
    "usual": (2, 2, 16, 32, 4, True),
    "grouped": (2, 6, 12, 20, 3, True),
    "without gate": (1, 2, 7, 5, 2, False),
}


def inputs(size: str, dtype: torch.dtype = torch.float64, batch: int = 2) -> dict[str, Any]:
    H, HV, K, V, taps, gated = SIZES[size]
    generator = torch.Generator().manual_seed(5)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    keys, values = H * K, HV * V
    return {
        "q": randn(batch, 1, keys), "k": randn(batch, 1, keys), "v": randn(batch, 1, values), "a": randn(batch, 1, HV) * 8,
        "b": randn(batch, 1, HV), "gate": randn(batch, 1, values) if gated else None, "q_conv": randn(keys, taps),
        "k_conv": randn(keys, taps), "v_conv": randn(values, taps), "A_log": randn(HV), "dt_bias": randn(HV) - 4,
        "norm_weight": randn(V), "window": randn(batch, 2 * keys + values, taps - 1),
        "state": randn(batch, HV, K, V).to(torch.promote_types(dtype, torch.float32)), "beta_scale": 2.0, "eps": 0.1,
    }  # fmt: skip


def errors(size: str, dtype: torch.dtype) -> tuple[float, ...]:
    given = {name: fenced(x) if isinstance(x, torch.Tensor) else x for name, x in inputs(size, dtype).items()}
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    with Fences():
        found = gdn_step(**given, form="triton")
    assert [x.dtype for x in found] == [dtype, given["state"].dtype, dtype]
    return tuple(relative(x, y) for x, y in zip(found, gdn_step(**wide, form="reference"), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_step(size: str, dtype: torch.dtype) -> None:
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
    y, state, window = errors(size, dtype)
    assert y <= rounding
    assert state <= min(rounding, 1e-6)  # nothing is rounded on its way into the state
    assert window == 0.0


@torch.no_grad()
def test_blocks_of_values_in_reversed_order() -> None:
    with forced({"kernel": "gdn_step.step", "config": {"BK": 16, "BV": 8, "num_warps": 4}}), rehearse(backwards=True):
        assert max(errors("grouped", torch.float64)) < 1e-13


@torch.no_grad()
def test_gates_at_the_ends_of_their_range() -> None:
    """Steps so small that 1 + e^x rounds to 1, and so large that nothing is left of the state."""
    given = inputs("usual")
    given["a"] = torch.tensor([[[-60.0, 60.0]], [[-35.0, 1000.0]]], dtype=torch.float64)
    found, wanted = (gdn_step(**given, form=form) for form in ("triton", "reference"))
    assert max(relative(x, y) for x, y in zip(found, wanted, strict=True)) < 1e-13


def test_no_gradients() -> None:
    given = inputs("usual")
    given["v"].requires_grad_()
    y, _, _ = gdn_step(**given, form="triton")
    with pytest.raises(NotImplementedError, match=r"call it under torch.no_grad\(\)"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["q", "v", "a", "gate", "window"])
def test_shapes_that_do_not_fit(name: str) -> None:
    given = inputs("usual")
    given[name] = given[name][..., 1:]
    with pytest.raises(ValueError, match="want"):
        gdn_step(**given)


def decoded(options: dict[str, Any], form: str | None) -> tuple[torch.Tensor, Any]:
    config = {"name": "toy", "vocab_size": 11, "d_model": 16, "layers": "gdn", "blocks": {"gdn": {"heads": 2, **options}}}
    model = zoo.create(config, dtype=torch.float64)
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    state = model.init_state(2)
    logits = []
    with torch.no_grad(), zoo.kernels.use(form):
        for t in range(5):
            out = model(ids[:, t : t + 1], state)
            logits.append(out.logits)
            state = out.state
    return torch.cat(logits, dim=1), state


@pytest.mark.parametrize("options", [{}, {"value_heads": 4, "expand_v": 0.5, "neg_eigval": True, "gate": False}])
def test_a_model_decodes_alike(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels.gdn_step import triton

    launches = []
    monkeypatch.setattr(triton, "run", lambda *inputs: launches.append(1) or triton.fused(*inputs))
    monkeypatch.setattr("zoo.kernels.dispatch._triton_runs", {})
    wanted, wanted_state = decoded(options, "chunked")
    assert not launches
    found, state = decoded(options, "triton")
    assert len(launches) == 5
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tuple(state.fast), tuple(wanted_state.fast), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.window[0][0], wanted_state.window[0][0], rtol=1e-10, atol=1e-10)


def test_it_serves_single_tokens_without_gradients() -> None:
    token, window = torch.zeros(1, 1, 4), torch.zeros(1, 2, 4)
    with torch.no_grad():
        assert not one_launch(token)  # on a CPU
    with zoo.kernels.use("triton"):
        assert not one_launch(token)
        with torch.no_grad():
            assert one_launch(token)
            assert not one_launch(window)

"""The Triton form of the short convolutions against the definition in float64."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.kernels.checking import check_compiled, check_gradients, check_operator, relative
from tests.kernels.interpreter import rehearse
from zoo.kernels.causal_conv1d import chunked
from zoo.kernels.causal_conv1d.op import causal_conv1d
from zoo.kernels.dynamic_conv1d.op import dynamic_conv1d
from zoo.kernels.tuning import forced

SMALL = {"kernel": "causal_conv1d.backward", "config": {"BR": 8, "BL": 4, "BC": 32, "num_warps": 4}}


@pytest.fixture(autouse=True)
def several_programs() -> Iterator[None]:
    """Short runs of few channels: the edges of programs fall inside of small inputs, which take less time."""
    with forced(SMALL):
        yield


OPERATORS = {"causal_conv1d": causal_conv1d, "dynamic_conv1d": dynamic_conv1d}


def inputs(operator: str, T: int, *, K: int = 4, C: int = 20, ends: list[int] | None = None, bias: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    B, S = (1, len(ends) - 1) if ends else (2, 2)
    given: dict[str, Any] = {"x": randn(B, T, C), "initial_state": randn(S, C, K - 1)}
    given["weight"] = randn(C, K) if operator == "causal_conv1d" else randn(B, T, C, K)
    if operator == "causal_conv1d" and bias:
        given["bias"] = randn(C)
    if ends:
        given["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    return given


def runner(operator: str, form: str, **options: Any) -> Any:
    return partial(OPERATORS[operator], form=form, output_final_state=True, **options)


def check(operator: str, given: dict[str, Any], options: dict[str, Any] | None = None, **how: Any) -> None:
    run, reference = (runner(operator, form, **(options or {})) for form in ("triton", "reference"))
    check_operator(run, reference, given, **how)


@pytest.mark.parametrize("T", [1, 2, 63, 65, pytest.param(200, marks=pytest.mark.extended)])
def test_lengths(T: int) -> None:
    check("causal_conv1d", inputs("causal_conv1d", T))


@pytest.mark.parametrize("T", [1, 65])
def test_lengths_with_a_kernel_for_every_token(T: int) -> None:
    check("dynamic_conv1d", inputs("dynamic_conv1d", T))


def test_plain_configuration() -> None:
    with forced({"kernel": "no other"}):
        check("causal_conv1d", inputs("causal_conv1d", 131, C=33))


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("operator", OPERATORS)
def test_taps(operator: str, K: int) -> None:
    check(operator, inputs(operator, 9, K=K, C=5))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_activation(bias: bool, activation: str | None) -> None:
    check("causal_conv1d", inputs("causal_conv1d", 7, C=35, bias=bias), {"activation": activation})


@pytest.mark.parametrize("K", [3, 6])
@pytest.mark.parametrize("operator", OPERATORS)
def test_packed(operator: str, K: int) -> None:
    """Sequences of 1, 2, 31, 1, 33, 1 and 5 tokens."""
    check(operator, inputs(operator, 74, K=K, C=7, ends=[0, 1, 3, 34, 35, 68, 69, 74]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_narrow(operator: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    check(operator, inputs(operator, 33), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator: str) -> None:
    check_gradients(runner(operator, "triton"), inputs(operator, 6, K=3, C=3, ends=[0, 1, 4, 6]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_reversed_order(operator: str) -> None:
    with rehearse(backwards=True):
        check(operator, inputs(operator, 34, C=40))


def test_one_result_may_go_unused() -> None:
    given = inputs("causal_conv1d", 6)
    leaves = [x.requires_grad_() for x in given.values()]
    for used in (0, 1):
        outcomes = [runner("causal_conv1d", form)(**given)[used] for form in ("triton", "reference")]
        grads = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True) for y in outcomes]
        assert max(relative(a, b) for a, b in zip(*grads, strict=True)) < 1e-14


def test_views_are_read_where_they_lie() -> None:
    """Part of a wide projection, and a state and a gradient in any layout."""
    given = inputs("causal_conv1d", 6)
    given["x"] = torch.randn(2, 6, 70, dtype=torch.float64)[..., 30:50]
    given["initial_state"] = given["initial_state"].mT.contiguous().mT
    for x in (given["x"], given["x"].mT.contiguous().mT):
        leaf = x.detach().requires_grad_()
        outcomes = []
        for form in ("triton", "reference"):
            y, final = runner("causal_conv1d", form)(**{**given, "x": leaf})
            outcomes.append((y, final, *torch.autograd.grad(y.sum() + final.sum(), leaf)))
        assert max(relative(a, b) for a, b in zip(*outcomes, strict=True)) < 1e-14


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("form", ["triton", "chunked"])
def test_steps_are_the_sequence(form: str, K: int) -> None:
    given = inputs("causal_conv1d", 7, K=K)
    whole, end = causal_conv1d(**given, output_final_state=True, form="reference")
    state: Tensor | None = given["initial_state"]
    steps = []
    for t in range(7):
        step = {**given, "x": given["x"][:, t : t + 1], "initial_state": state}
        y, state = causal_conv1d(**step, output_final_state=True, form=form)
        steps.append(y)
    assert relative(torch.cat(steps, dim=1), whole) < 1e-14
    assert state is not None
    assert end is not None
    assert torch.equal(state, end)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_token_is_rounded_once(dtype: torch.dtype) -> None:
    given = {name: value.to(dtype) for name, value in inputs("causal_conv1d", 1).items()}
    y, end = causal_conv1d(**given, output_final_state=True, form="chunked")
    exact, exact_end = causal_conv1d(**{name: value.double() for name, value in given.items()}, output_final_state=True, form="reference")
    assert y.dtype == end.dtype == dtype
    assert ((y - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs()).all()
    assert torch.equal(end.double(), exact_end)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_many_channels_are_computed_in_pieces(gradients: bool, bias: bool, activation: Literal["silu"] | None) -> None:
    given = {name: value.requires_grad_(gradients) for name, value in inputs("causal_conv1d", 70, C=3000, bias=bias).items()}
    assert given["x"].numel() > 2 * chunked.PIECE
    found, want = (causal_conv1d(**given, activation=activation, output_final_state=True, form=form) for form in ("chunked", "reference"))
    torch.testing.assert_close(found, want)
    if gradients:
        found, want = (torch.autograd.grad(y.square().sum(), given.values()) for y, _ in (found, want))
        torch.testing.assert_close(found, want)


def test_compiled() -> None:
    given = inputs("causal_conv1d", 5, C=6)
    check_compiled(runner("causal_conv1d", "triton"), given)
    from zoo.kernels.causal_conv1d.triton import convolution

    leaves = {name: x.requires_grad_() for name, x in given.items()}
    torch.library.opcheck(convolution.op, (leaves["x"], leaves["weight"], leaves["bias"], leaves["initial_state"], None, True))
    given = inputs("dynamic_conv1d", 5, C=6, ends=[0, 2, 5])
    values = (given["x"].requires_grad_(), given["weight"], None, given["initial_state"], given["cu_seqlens"], True)
    torch.library.opcheck(convolution.op, values)

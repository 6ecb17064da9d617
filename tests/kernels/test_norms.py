"""The norms, in both forms, against their formulas in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.checking import check_compiled, check_gradients, check_operator, relative
from tests.kernels.interpreter import rehearse
from zoo.kernels.gated_rmsnorm.op import gated_rmsnorm
from zoo.kernels.l2norm.op import l2norm
from zoo.kernels.rmsnorm.op import rmsnorm

EPS = 0.3  # large enough to be missed


def unit(x: Tensor, squares: Tensor) -> Tensor:
    return x / (squares + EPS) ** 0.5


def mean_square(x: Tensor) -> Tensor:
    return (x * x).mean(-1, keepdim=True)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


# name: (operator, its options, the formula)
NORMS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "plain": (rmsnorm, {"style": "plain"}, lambda x, weight: unit(x, mean_square(x)) * weight),
    "wide": (rmsnorm, {"style": "wide"}, lambda x, weight: unit(x, mean_square(x)) * weight),
    "centred": (rmsnorm, {"style": "centred"}, lambda x, weight: unit(x, mean_square(x)) * (1 + weight)),
    "then gate": (gated_rmsnorm, {}, lambda x, gate, weight: unit(x, mean_square(x)) * weight * silu(gate)),
    "gate first": (
        gated_rmsnorm,
        {"gate_first": True},
        lambda x, gate, weight: unit(x * silu(gate), mean_square(x * silu(gate))) * weight,
    ),
    "l2": (l2norm, {}, lambda x: unit(x, (x * x).sum(-1, keepdim=True))),
}
# x's shape, and whether the weight has a row for each group
SHAPES = {
    "rows": ((2, 65, 48), False),
    "odd groups": ((3, 7, 5, 33), True),
    "heads": ((1, 200, 3, 16), False),
    "one row": ((1, 1, 20), False),
}


def inputs(name: str, shape: tuple[int, ...], grouped: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    randn = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    given = {"x": randn(*shape) * 3}
    if "gate" in name:
        given["gate"] = randn(*shape)
    if name != "l2":
        given["weight"] = randn(*(shape[-2:] if grouped else shape[-1:]))
    return given


def runner(name: str, form: str) -> Any:
    operator, options, _ = NORMS[name]
    return lambda **given: operator(**given, **options, eps=EPS, form=form)


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_float64(name: str, shape: str, form: str) -> None:
    check_operator(runner(name, form), NORMS[name][2], inputs(name, *SHAPES[shape]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_narrow(name: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    check_operator(runner(name, "triton"), NORMS[name][2], inputs(name, (1, 65, 2, 32)), dtype=dtype, tolerance=tolerance)


def test_casts_are_those_of_the_reference() -> None:
    """bfloat16: in each style both forms round at the same places, so they differ in few of the last digits."""
    for name in ("plain", "wide", "centred", "gate first", "l2"):
        given = {field: x.bfloat16() for field, x in inputs(name, (4, 65, 32)).items()}
        if name == "gate first":
            given["x"] = given["x"].float()  # what a scan in float32 hands on
        triton, reference = (runner(name, form)(**given) for form in ("triton", "reference"))
        assert triton.dtype == reference.dtype == torch.bfloat16
        assert (triton != reference).float().mean() < 2e-3, name
    x, weight = inputs("plain", (9, 16)).values()
    for style, dtype in (("plain", torch.float32), ("wide", torch.bfloat16), ("centred", torch.bfloat16)):
        for form in ("reference", "triton"):
            assert rmsnorm(x.bfloat16(), weight.float(), style=style, form=form).dtype == dtype  # type: ignore[arg-type]


def test_views_are_read_where_they_lie() -> None:
    """Halves of wide rows, as a projection of several parts gives them, and a transposed input."""
    whole = torch.randn(2, 9, 96, dtype=torch.float64)
    x, gate, weight = (
        whole[..., :48].unflatten(-1, (3, 16)),
        whole[..., 48:].unflatten(-1, (3, 16)),
        torch.randn(3, 16, dtype=torch.float64),
    )
    for given in ((x, gate), (x.transpose(0, 1), gate.transpose(0, 1)), (x.mT.contiguous().mT, gate)):
        assert relative(gated_rmsnorm(*given, weight, form="triton"), gated_rmsnorm(*given, weight, form="reference")) < 1e-14


@pytest.mark.parametrize("name", NORMS)
def test_gradcheck(name: str) -> None:
    check_gradients(runner(name, "triton"), inputs(name, (2, 5, 2, 12), grouped=True))


def test_many_blocks_in_reversed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows to a program, the last of them empty."""
    from zoo.kernels.rmsnorm import triton

    monkeypatch.setattr(triton, "_plain", lambda R, N: {"BR": 4, "BN": 16})
    monkeypatch.setattr(triton, "PARTIAL_SUMS", 3)
    with rehearse(backwards=True):
        check_operator(runner("gate first", "triton"), NORMS["gate first"][2], inputs("gate first", (33, 2, 11), grouped=True))


def test_compiled() -> None:
    given = inputs("then gate", (2, 5, 2, 12))
    check_compiled(runner("then gate", "triton"), given)
    from zoo.kernels.rmsnorm.triton import norm

    leaves = [x.requires_grad_() for x in given.values()]
    torch.library.opcheck(norm.op, (*leaves, EPS, True, False, False, True))
    torch.library.opcheck(norm.op, (leaves[0], None, None, EPS, False, False, False, False))


def test_errors_name_the_field() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight \[3\]: want \[N\] or \[G, N\] for x \[2, 3, 4\]"):
        rmsnorm(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"style: 'narrow' is not one of: plain, wide, centred"):
        rmsnorm(x, torch.zeros(4), style="narrow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gate \[2, 4\]: want \[2, 3, 4\]"):
        gated_rmsnorm(x, x[:, 0], torch.zeros(4))

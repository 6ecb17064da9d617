"""The Triton form of the selective scan against the step recurrence in float64, under autograd and under the compiler."""

import functools

import pytest
import torch

from tests.kernels import checking
from tests.kernels.interpreter import rehearse
from zoo.kernels import tuning
from zoo.kernels.common.examples import example
from zoo.kernels.selective_scan import triton
from zoo.kernels.selective_scan.op import selective_scan

fused = functools.partial(selective_scan, form="triton", output_final_state=True)
recurrent = functools.partial(selective_scan, form="reference", output_final_state=True)
check = functools.partial(checking.check_operator, fused, recurrent)
WIDE = ("dt", "A", "initial_state")


def inputs(T: int, *, D: int = 6, N: int = 4, batch: int = 1) -> dict[str, torch.Tensor]:
    return example("selective_scan", T=T, D=D, N=N, batch=batch, seed=9, dtype=torch.float64)


@pytest.mark.parametrize("T", [1, 7, 8, 9])
def test_lengths_around_a_saved_state(T: int) -> None:
    check(inputs(T, batch=2))


@pytest.mark.parametrize(("D", "N"), [(40, 8), (17, 16), (16, 64), (3, 24)])
def test_channels_and_states(D: int, N: int) -> None:
    check(inputs(10, D=D, N=N))


def test_packed_sequences() -> None:
    ends = torch.tensor([0, 1, 64, 65, 130, 330])  # lengths 1, 63, 1, 65 and 200
    values = inputs(330)
    values["initial_state"] = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(3))
    with rehearse(backwards=True):
        check({**values, "cu_seqlens": ends})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    check(inputs(20), dtype=dtype, wide=WIDE)


@pytest.mark.parametrize("decay", [0.0, 50.0])
def test_without_decay_and_with_strong_decay(decay: float) -> None:
    values = inputs(20)
    values["A"] = decay * values["A"]
    values["dt"] = values["dt"].detach().index_fill(1, torch.tensor([0, 5, 19]), 0.0)  # no step: the state stays as it is
    for dtype in (torch.float64, torch.float32):
        check(values, dtype=dtype, wide=WIDE)


def test_a_state_does_not_change_where_dt_is_zero() -> None:
    values = inputs(9)
    _, final = fused(**{**values, "dt": torch.zeros_like(values["dt"])})
    assert torch.equal(final, values["initial_state"])


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_gradients(used: int) -> None:
    values = inputs(9)
    grads = [
        torch.autograd.grad(run(**values)[used].square().sum(), list(values.values()), allow_unused=True) for run in (fused, recurrent)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-10, atol=1e-10)


def test_states_are_saved_for_gradients_alone() -> None:
    values = tuple(x.detach() for x in inputs(20).values())
    assert triton._allocate(*values, None, False)[2].numel() == 0
    assert len(triton._allocate(*values, None, True)[2]) == 3
    want, want_final = recurrent(**dict(zip(inputs(1), values, strict=True)))
    y, final = fused(**dict(zip(inputs(1), values, strict=True)))
    torch.testing.assert_close((y, final), (want, want_final))


def test_inputs_that_are_views() -> None:
    values = inputs(9)
    B, C = torch.cat([values["B"], values["C"]], dim=-1).detach().split(4, dim=-1)
    want, _ = recurrent(**values)
    torch.testing.assert_close(fused(**{**values, "B": B, "C": C, "u": values["u"].mT.contiguous().mT})[0], want)


def test_every_shipped_block_size() -> None:
    rows = [row for row in tuning.table() if row["kernel"].startswith("selective_scan.")]
    for row in {(row["kernel"], *row["config"].items()): row for row in rows}.values():
        with tuning.forced(row):
            check(inputs(row["shape"].get("T", 10), D=20, N=row["shape"]["N"]))


def test_finite_differences() -> None:
    checking.check_gradients(fused, inputs(10))


def test_the_compiler_sees_one_operator() -> None:
    checking.check_compiled(fused, inputs(2))
    torch.library.opcheck(triton._scan.op, (*inputs(2).values(), None, True))

"""The Triton form of state-space duality against the step recurrence in float64, under autograd and under the compiler."""

import functools

import pytest
import torch

from tests.kernels import checking
from tests.kernels.interpreter import rehearse
from zoo.kernels import tuning
from zoo.kernels.common.examples import example
from zoo.kernels.ssd import chunked, triton
from zoo.kernels.ssd.op import ssd

fused = functools.partial(ssd, form="triton", output_final_state=True)
recurrent = functools.partial(ssd, form="reference", output_final_state=True)
check = functools.partial(checking.check_operator, fused, recurrent)
WIDE = ("dt", "A", "initial_state")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(T: int, *, P: int = 16, N: int = 16, **sizes: int) -> dict[str, torch.Tensor]:
    return example("ssd", T=T, P=P, N=N, seed=9, dtype=torch.float64, **sizes)


@pytest.mark.parametrize("T", [1, 63, 65])
def test_lengths_that_fill_no_chunk(T: int) -> None:
    check(inputs(T, batch=2))


@pytest.mark.parametrize("sizes", [{"H": 4, "G": 2, "P": 20, "N": 24}, {"H": 6, "G": 1, "P": 40, "N": 8}, {"H": 2, "G": 2, "P": 5, "N": 3}])
def test_head_sizes_and_groups(sizes: dict[str, int]) -> None:
    check(inputs(40, **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(dtype: torch.dtype) -> None:
    ends = torch.tensor([0, 1, 64, 65, 130, 330])  # lengths 1, 63, 1, 65 and 200
    values = inputs(330, H=1)
    values["initial_state"] = torch.randn(5, *values["initial_state"].shape[1:], generator=torch.Generator().manual_seed(3))
    with rehearse(backwards=True):
        check({**values, "cu_seqlens": ends}, dtype=dtype, wide=WIDE)


@torch.no_grad()
@pytest.mark.parametrize("T", [128, 200])
def test_prompts_are_read_in_pieces(T: int) -> None:
    values = {name: value.detach() for name, value in inputs(T, batch=2, H=16, P=64, N=8).items()}
    assert values["x"].numel() > 2 * chunked.PIECE
    torch.testing.assert_close(ssd(**values, form="chunked", output_final_state=True), recurrent(**values))


@pytest.mark.parametrize("decay", [0.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_decay_and_with_strong_decay(decay: float, dtype: torch.dtype) -> None:
    values = inputs(70)
    values["A"] = decay * values["A"]
    values["dt"] = values["dt"].detach().index_fill(1, torch.tensor([0, 5, 30, 69]), 0.0)  # no step: the state stays as it is
    check(values, dtype=dtype, wide=WIDE)


def test_small_decays_after_a_large_one_keep_their_digits() -> None:
    values = inputs(64)
    dt = torch.full_like(values["dt"], 1e-3)
    dt[:, 3] = 1e5
    measured = checking.errors(fused, recurrent, {**values, "dt": dt}, dtype=torch.float32, wide=WIDE)
    assert max(measured.values()) < 2e-6, measured


def test_a_state_does_not_change_where_dt_is_zero() -> None:
    values = inputs(33)
    _, final = fused(**{**values, "dt": torch.zeros_like(values["dt"])})
    assert torch.equal(final, values["initial_state"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_rounded_as_tensor_cores_do(dtype: torch.dtype) -> None:
    with rehearse(tf32=True):
        check(inputs(130, batch=1, P=64, N=64), dtype=dtype, wide=WIDE)


def test_inputs_of_several_dtypes() -> None:
    values = inputs(20)
    narrow = {name: x.detach().to(torch.bfloat16 if name in "xBC" else torch.float32).requires_grad_() for name, x in values.items()}
    narrow["B"] = values["B"].detach().float().requires_grad_()
    y, final = fused(**narrow)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    gradients = torch.autograd.grad(y.float().sum() + final.sum(), list(narrow.values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in narrow.values()]


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_gradients(used: int) -> None:
    values = inputs(20)
    grads = [
        torch.autograd.grad(run(**values)[used].square().sum(), list(values.values()), allow_unused=True) for run in (fused, recurrent)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-10, atol=1e-10)


def test_inputs_that_are_views() -> None:
    values = inputs(20)
    whole = torch.cat([values["B"], values["C"]], dim=-1).detach()
    B, C = whole.split(16, dim=-1)
    want, _ = recurrent(**values)
    torch.testing.assert_close(fused(**{**values, "B": B, "C": C, "x": values["x"].mT.contiguous().mT})[0], want)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_summed_in_one_program_or_in_several(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_heads_per_program", lambda H, G, chunks: heads)
    check(inputs(35, H=4))


def test_how_many_heads_a_program_sums() -> None:
    assert triton._heads_per_program(H=64, G=1, chunks=1) == 1
    assert triton._heads_per_program(H=64, G=1, chunks=32) == 4
    assert triton._heads_per_program(H=24, G=1, chunks=10**6) == 24
    assert triton._heads_per_program(H=24, G=8, chunks=10**6) == 3
    assert triton._heads_per_program(H=24, G=2, chunks=80) == 6


def test_every_shipped_block_size() -> None:
    rows = [row for row in tuning.table() if row["kernel"].startswith("ssd.")]
    for row in {(row["kernel"], *row["config"].items()): row for row in rows}.values():
        with tuning.forced(row):
            check(inputs(row["shape"].get("T", row["config"].get("BT", 0) + 3), N=17, P=70, H=1))


def test_finite_differences() -> None:
    checking.check_gradients(fused, inputs(18, P=5, N=3, H=1))


def test_the_compiler_sees_one_operator() -> None:
    checking.check_compiled(fused, inputs(3))
    torch.library.opcheck(triton._ssd.op, (*inputs(3).values(), None))

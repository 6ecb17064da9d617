"""The interpreter of these tests catches what Triton's own lets pass."""

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests.kernels import toys
from tests.kernels.checking import Fences, fenced
from tests.kernels.interpreter import rehearse


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def product(a: torch.Tensor, b: torch.Tensor, precision: str = "tf32") -> torch.Tensor:
    c = torch.empty(a.shape)
    toys.product[(1,)](a, b, c, len(a), precision)
    return c


def test_products_of_bfloat16() -> None:
    a, b = randn(16, 16, dtype=torch.bfloat16), randn(16, 16, dtype=torch.bfloat16).T.contiguous()
    torch.testing.assert_close(product(a, b), a.float() @ b.float())


def test_products_of_float32_lose_digits_only_when_rehearsed() -> None:
    a, b = randn(16, 16), randn(16, 16).T.contiguous()
    torch.testing.assert_close(product(a, b), a @ b)
    with rehearse(tf32=True):
        error = (product(a, b) - a @ b).abs().max()
        assert 1e-4 < error < 1e-2
        torch.testing.assert_close(product(a, b, "tf32x3"), a @ b)
    with pytest.raises(InterpreterError, match="ieee"):
        product(a, b, "ieee")


def test_casts_round_to_nearest_even() -> None:
    x = torch.cat([randn(60), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])])
    y = torch.empty(64, dtype=torch.bfloat16)
    toys.rounded[(1,)](x, y, 64, 64)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(64, dtype=torch.float64)
    toys.rounded[(1,)](y, back, 64, 64)
    torch.testing.assert_close(back, y.double(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_arithmetic_is_refused() -> None:
    x = randn(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="upcast right after the load"):
        toys.bf16_sum[(1,)](x, x.clone(), 16)


def test_addresses_out_of_bounds() -> None:
    x, y = fenced(randn(16)), fenced(torch.zeros(16))
    toys.copied[(1,)](x, y, 0, 16, 16, 16)
    assert torch.equal(x, y)
    for bad in ((1, 16, 16), (-1, 16, 16), (0, 32, 16), (0, 16, 32)):
        with pytest.raises(InterpreterError, match="outside of every tensor"):
            toys.copied[(1,)](x, y, *bad, 32)


def test_a_mask_without_other_gives_nan() -> None:
    x, y = randn(16), torch.zeros(16)
    toys.copied[(1,)](x, y, 0, 12, 16, 16)
    assert y[12:].isnan().all()
    assert torch.equal(y[:12], x[:12])


def test_races() -> None:
    x, y = randn(4), torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"race: program \d has a load"):
        toys.running[(4,)](x, y)
    with pytest.raises(RuntimeError, match=r"race: program \d has a store"):
        toys.last_wins[(4,)](y)


def test_reversed_order() -> None:
    last = {}
    for backwards in (False, True):
        y = torch.zeros(1)
        with rehearse(backwards=backwards), pytest.raises(RuntimeError, match="race"):
            toys.last_wins[(4,)](y)
        last[backwards] = y.item()
    assert last == {False: 3.0, True: 0.0}


def test_fences() -> None:
    fences = Fences()
    with fences:
        x = torch.empty(3, 4).new_empty(2, 2)
        assert torch.empty_like(x.T).stride() == (1, 2)
        assert torch.empty(2, dtype=torch.bfloat16).isnan().all()
        assert x.isnan().all()
        x.fill_(1)
    torch.as_strided(x, (5,), (1,))[4] = 1
    with pytest.raises(AssertionError, match=r"written outside of a tensor \[2, 2\]"):
        fences.check()

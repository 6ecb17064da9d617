"""Every chunked form against the float64 step recurrence, at lengths that do not fit, with strong and without any decay."""

import pytest
import torch

import zoo
from zoo.kernels.causal_conv1d.op import causal_conv1d
from zoo.kernels.dynamic_conv1d.op import dynamic_conv1d
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.selective_scan.op import selective_scan
from zoo.kernels.ssd.op import ssd

LENGTHS = (2, 3, 16, 17, 63, 64, 65, 130, 300)
DECAYS = {"none": 0.0, "slow": 0.01, "usual": 0.5, "strong": 50.0}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def scan_inputs(T: int, decay: float) -> dict[str, torch.Tensor]:
    u, B, C = random(2, T, 6), random(2, T, 5, seed=1), random(2, T, 5, seed=2)
    dt = random(2, T, 6, seed=3).abs()
    dt[:, T // 2] = 0
    return {"u": u, "dt": dt, "A": -decay * random(6, 5).exp(), "B": B, "C": C, "initial_state": random(2, 6, 5)}


def ssd_inputs(T: int, decay: float) -> dict[str, torch.Tensor]:
    dt = random(2, T, 4, seed=3).abs()
    dt[:, T // 2] = 0
    B, C = random(2, T, 2, 3, seed=1), random(2, T, 2, 3, seed=2)
    return {"x": random(2, T, 4, 5), "dt": dt, "A": -decay * random(4).exp(), "B": B, "C": C, "initial_state": random(2, 4, 3, 5)}


def delta_inputs(T: int, decay: float) -> dict[str, torch.Tensor]:
    # strongly correlated keys written at full strength: the hard case for the inverse of (I + A)
    k = torch.nn.functional.normalize(random(2, 1, 2, 8) + 0.1 * random(2, T, 2, 8, seed=1), dim=-1)
    q = torch.nn.functional.normalize(random(2, T, 2, 8, seed=2), dim=-1)
    g, beta = -decay * random(2, T, 4).abs(), torch.full((2, T, 4), 0.9, dtype=torch.float64)
    return {"q": q, "k": k, "v": random(2, T, 4, 6), "g": g, "beta": beta, "initial_state": random(2, 4, 8, 6)}


CASES = {"selective_scan": (selective_scan, scan_inputs), "ssd": (ssd, ssd_inputs), "gated_delta_rule": (gated_delta_rule, delta_inputs)}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("operator", CASES)
def test_chunked_is_the_recurrence(operator: str, T: int, decay: str) -> None:
    run, inputs = CASES[operator]
    wide = inputs(T, DECAYS[decay])
    with zoo.kernels.use("reference"):
        want, want_state = run(**wide, output_final_state=True)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        got, state = run(**{name: x.to(dtype) for name, x in wide.items()}, output_final_state=True)
        assert got.dtype == state.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
        torch.testing.assert_close(state.double(), want_state, rtol=tolerance, atol=tolerance * want_state.abs().max().item())


@pytest.mark.parametrize("operator", CASES)
def test_gradients_of_the_chunked_form(operator: str) -> None:
    run, inputs = CASES[operator]
    values = inputs(18, 0.5)
    gradients = []
    for form in ("chunked", "reference"):
        leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
        with zoo.kernels.use(form):
            y, state = run(**leaves, output_final_state=True)
        gradients.append(torch.autograd.grad(y.square().sum() + state.square().sum(), list(leaves.values())))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 3, 20])
@pytest.mark.parametrize("operator", [causal_conv1d, dynamic_conv1d])
def test_convolution(operator, T: int) -> None:
    x, tail = random(2, T, 3), random(2, 3, 3)
    weight = random(3, 4) if operator is causal_conv1d else random(2, T, 3, 4)
    with zoo.kernels.use("reference"):
        want = operator(x, weight, tail=tail)
    torch.testing.assert_close(operator(x, weight, tail=tail), want)


def test_wrong_shapes_are_refused() -> None:
    good = scan_inputs(4, 0.5)
    with pytest.raises(ValueError, match="want"):
        selective_scan(**{**good, "B": good["B"][:, :2]})
    good = ssd_inputs(4, 0.5)
    with pytest.raises(ValueError, match="want"):
        ssd(**{**good, "initial_state": good["initial_state"].mT})
    with pytest.raises(ValueError, match="want"):
        dynamic_conv1d(random(2, 4, 3), random(3, 4))

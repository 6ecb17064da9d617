"""Every chunked form against the float64 step recurrence, at lengths that do not fit, with strong and without any decay."""

import itertools

import pytest
import torch

import zoo
from zoo.kernels.causal_conv1d.op import causal_conv1d
from zoo.kernels.dynamic_conv1d.op import dynamic_conv1d
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.kda.op import kda
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
        want, _ = operator(x, weight, initial_state=tail)
    got, newest = operator(x, weight, initial_state=tail, output_final_state=True)
    torch.testing.assert_close(got, want)
    assert torch.equal(newest, torch.cat([tail, x.mT], dim=-1)[..., -3:])


def test_convolution_with_bias_and_without_activation() -> None:
    x, weight, bias = random(2, 5, 3), random(3, 4), random(3)
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    want = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3).mT
    torch.testing.assert_close(causal_conv1d(x, weight, bias, activation=None)[0], want)
    torch.testing.assert_close(causal_conv1d(x, weight, bias)[0], torch.nn.functional.silu(want))
    with pytest.raises(ValueError, match="activation: 'gelu' is not one of: silu, None"):
        causal_conv1d(x, weight, activation="gelu")  # type: ignore[arg-type]


ENDS = (0, 1, 66, 68, 130)  # sequences of 1, 65, 2 and 62 tokens
SHARED = {"A", "weight"}  # inputs without a token dimension


def conv_inputs(T: int, _: float) -> dict[str, torch.Tensor]:
    return {"x": random(2, T, 3), "weight": random(3, 4), "initial_state": random(2, 3, 3)}


def dynamic_inputs(T: int, _: float) -> dict[str, torch.Tensor]:
    return {"x": random(2, T, 3), "weight": random(2, T, 3, 4), "initial_state": random(2, 3, 3)}


def kda_inputs(T: int, decay: float) -> dict[str, torch.Tensor]:
    k, q = (torch.nn.functional.normalize(random(2, T, 2, 8, seed=seed), dim=-1) for seed in (1, 2))
    given = {"q": q, "k": k, "v": random(2, T, 2, 6), "g": -decay * random(2, T, 2, 8).abs(), "beta": random(2, T, 2).sigmoid()}
    return given | {"initial_state": random(2, 2, 8, 6)}


PACKED = CASES | {
    "kda": (kda, kda_inputs),
    "causal_conv1d": (causal_conv1d, conv_inputs),
    "dynamic_conv1d": (dynamic_conv1d, dynamic_inputs),
}


@pytest.mark.parametrize("form", ["reference", "chunked"])
@pytest.mark.parametrize("operator", PACKED)
def test_packed_sequences_do_not_see_each_other(operator: str, form: str) -> None:
    run, inputs = PACKED[operator]
    values = inputs(ENDS[-1], 0.5)
    state = values.pop("initial_state")
    states = torch.cat([state, -state])
    shared = {name for name in values if name in SHARED and values[name].ndim <= 2}
    row = {name: (x if name in shared else x[:1]).requires_grad_() for name, x in values.items()}
    states.requires_grad_()
    y, final = run(**row, initial_state=states, output_final_state=True, cu_seqlens=torch.tensor(ENDS), form=form)
    alone = []
    for i, (start, end) in enumerate(itertools.pairwise(ENDS)):
        piece = {name: x if name in shared else x[:, start:end] for name, x in row.items()}
        alone.append(run(**piece, initial_state=states[i : i + 1], output_final_state=True, form=form))
    want, want_final = torch.cat([y for y, _ in alone], dim=1), torch.cat([state for _, state in alone])
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, want_final, rtol=1e-10, atol=1e-10)
    leaves = [*row.values(), states]
    grads = [torch.autograd.grad(a.square().sum() + b.square().sum(), leaves) for a, b in ((y, final), (want, want_final))]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


def test_bad_cu_seqlens_are_refused() -> None:
    values = scan_inputs(6, 0.5)
    del values["initial_state"]
    row = {name: x if name == "A" else x[:1] for name, x in values.items()}
    for bad in ([0, 4], [1, 6], [0, 4, 2, 6], [0, 3, 3, 6]):
        with pytest.raises(ValueError, match="strictly increasing from 0 to 6"):
            selective_scan(**row, cu_seqlens=torch.tensor(bad))
    with pytest.raises(ValueError, match="the batch has 2"):
        selective_scan(**values, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="int32 or int64"):
        selective_scan(**row, cu_seqlens=torch.tensor([0.0, 6.0]))
    with pytest.raises(ValueError, match=r"initial_state \[1, 6, 5\]: want \[2, 6, 5\]"):
        selective_scan(**row, cu_seqlens=torch.tensor([0, 2, 6]), initial_state=random(1, 6, 5))


def test_wrong_shapes_are_refused() -> None:
    good = scan_inputs(4, 0.5)
    with pytest.raises(ValueError, match="want"):
        selective_scan(**{**good, "B": good["B"][:, :2]})
    good = ssd_inputs(4, 0.5)
    with pytest.raises(ValueError, match="want"):
        ssd(**{**good, "initial_state": good["initial_state"].mT})
    with pytest.raises(ValueError, match="want"):
        dynamic_conv1d(random(2, 4, 3), random(3, 4))

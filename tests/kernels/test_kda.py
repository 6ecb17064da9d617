"""Kimi Delta Attention in PyTorch against the recurrence, written out again below, in float64."""

import pytest
import torch
from torch import Tensor

import zoo
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.kda.op import kda


def inputs(T, *, B=2, H=2, K=16, V=24, correlated=0.0, beta=None, decay=0.05, seed=0):
    """float64 q, k, v, g, beta, state. `correlated` in [0, 1]: 1 makes all keys equal."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    k = (1 - correlated) * randn(B, T, H, K) + correlated * randn(B, 1, H, K)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (randn(B, T, H, K), k))
    strength = torch.full((B, T, H), beta, dtype=torch.float64) if beta is not None else randn(B, T, H).sigmoid()
    return q, k, randn(B, T, H, V), -decay * randn(B, T, H, K).exp(), strength, randn(B, H, K, V)


def equation(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta k k^T) Diag(exp(g)) S_{t-1} + beta k v^T, o = S^T q / sqrt(K), with the matrices of the paper."""
    eye, S, outputs = torch.eye(q.shape[-1], dtype=q.dtype), state, []
    for t in range(q.shape[1]):
        kt, b = k[:, t, :, :, None], beta[:, t, :, None, None]
        S = (eye - b * kt @ kt.mT) @ torch.diag_embed(g[:, t].exp()) @ S + b * kt @ v[:, t, :, None, :]
        outputs.append((S.mT @ q[:, t, :, :, None]).squeeze(-1) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), S


def run(form, q, k, v, g, beta, state, dtype=torch.float64):
    q, k, v, g, beta, state = (x.to(dtype) for x in (q, k, v, g, beta, state))
    return kda(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, form=form)


def with_gradients(function, given):
    leaves = [x.clone().requires_grad_() for x in given]
    o, final = function(*leaves)
    return o, final, *torch.autograd.grad((o * o.detach().cos()).sum() + (final * final.detach().sin()).sum(), leaves)


def extreme(T):
    """Every channel decays by another order of magnitude, from not at all to at once, and some tokens decay everything."""
    q, k, v, g, beta, state = inputs(T, correlated=0.9, beta=0.97)
    g = g * torch.logspace(-6, 6, g.shape[-1], dtype=torch.float64)
    g[..., 0] = 0
    g[:, T // 3] = -1e5
    g[:, T // 2, :, ::2] = -torch.inf
    return q, k, v, g, beta, state


CASES = {
    "usual": lambda T: inputs(T),
    "equal keys, beta near 1": lambda T: inputs(T, correlated=0.95, beta=0.97, decay=1e-3),
    "no decay, full strength": lambda T: inputs(T, decay=0.0, beta=2.0),
    "strong decay": lambda T: inputs(T, decay=30.0),
    "extreme decays": extreme,
}


@pytest.mark.parametrize("T", [1, 2, 63, 65, 130])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_equation(case: str, T: int) -> None:
    given = CASES[case](T)
    wanted = with_gradients(equation, given)
    for form in ("reference", "chunked"):
        for found, want in zip(with_gradients(lambda *x, form=form: run(form, *x), given), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("T", [7, 64, 200])
def test_equal_decays_are_the_gated_delta_rule(T: int) -> None:
    """In results and gradients, of which that of a decay is the sum over its channels."""
    q, k, v, g, beta, state = inputs(T, correlated=0.5)
    given = q, k, v, g[..., 0], beta, state
    rule = lambda q, k, v, g, beta, state: gated_delta_rule(  # noqa: E731
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, form="chunked"
    )
    ours = lambda q, k, v, g, beta, state: run("chunked", q, k, v, g[..., None].expand_as(k), beta, state)  # noqa: E731
    for found, wanted in zip(with_gradients(ours, given), with_gradients(rule, given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [7, 200])
def test_what_is_not_recorded_is_the_same_and_leaves_its_inputs_alone(T: int) -> None:
    given, kept = inputs(T), inputs(T)
    recorded = run("chunked", *(x.clone().requires_grad_() for x in given))
    for found, wanted in zip(run("chunked", *given), recorded, strict=True):
        assert torch.equal(found, wanted)
    assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_float32_on_correlated_keys(seed: int) -> None:
    """Nearly equal keys, beta 0.9, slow decay: where a series over the whole chunk would explode."""
    given = inputs(256, correlated=0.9, beta=0.9, decay=1e-3, seed=seed, K=32, V=32)
    for found, wanted in zip(run("chunked", *given, dtype=torch.float32), equation(*given), strict=True):
        assert (found.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("spike", [10, 1000, 100_000])
def test_small_decays_after_a_strong_one_in_some_channels(spike: float) -> None:
    """As exact as without the strong one, whose size a difference of running sums would round to."""
    q, k, v, g, beta, state = inputs(64, correlated=0.9, beta=0.9, decay=1e-3, K=32, V=32)
    g[:, 5, :, ::3] = -spike
    given = q, k, v, g, beta, state
    for found, wanted in zip(run("chunked", *given, dtype=torch.float32), equation(*given), strict=True):
        assert (found.double() - wanted).abs().max() <= 4e-6 * wanted.abs().max().clamp(min=1)


@pytest.mark.extended
def test_a_traced_form_is_as_exact() -> None:
    given = inputs(192, correlated=0.95, beta=0.9, decay=1e-3, K=32, V=32)
    traced = torch.compile(lambda *x: run("chunked", *x, dtype=torch.float32), fullgraph=True, backend="eager")
    for found, wanted in zip(traced(*given), equation(*given), strict=True):
        assert (found.double() - wanted).abs().max() <= 4e-6 * wanted.abs().max()


def test_cut_anywhere() -> None:
    q, k, v, g, beta, state = inputs(100)
    whole, end = run("chunked", q, k, v, g, beta, state)
    pieces = []
    for part in torch.arange(100).split([1, 13, 66, 20]):
        o, state = run(None, q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


def test_arithmetic_is_float32_in_bfloat16() -> None:
    given = inputs(70)
    o, final = run("chunked", *given, dtype=torch.bfloat16)
    wanted, _ = equation(*(x.bfloat16().double() for x in given))
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert (o.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()  # one rounding of the result


@pytest.mark.parametrize(
    "change", [{"v": (2, 7, 3, 24)}, {"k": (2, 6, 2, 16)}, {"g": (2, 7, 2)}, {"beta": (2, 7, 2, 16)}, {"state": (2, 2, 24, 16)}]
)
def test_shapes_that_do_not_fit(change: dict[str, tuple[int, ...]]) -> None:
    given = dict(zip(["q", "k", "v", "g", "beta", "state"], inputs(7), strict=True))
    given.update({name: torch.zeros(shape) for name, shape in change.items()})
    with pytest.raises(ValueError, match="want"):
        kda(given["q"], given["k"], given["v"], g=given["g"], beta=given["beta"], initial_state=given["state"])


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(zoo.ZooError, match="kda: form: unknown kernel form 'chunk'"):
        run("chunk", *inputs(3))

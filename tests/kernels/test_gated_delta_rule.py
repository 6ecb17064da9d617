"""The chunked gated delta rule against the float64 recurrence."""

from collections import Counter
from functools import partial

import pytest
import torch

import zoo
from zoo.kernels.gated_delta_rule.chunked import invert_by_blocks, unit_lower_inverse
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.gated_delta_rule.reference import recurrent


def inputs(T, *, B=2, H=2, HV=None, K=16, V=24, correlated=0.0, beta=None, decay=0.05, seed=0):
    """float64 q, k, v, g, beta, state. `correlated` in [0, 1]: 1 makes all keys equal."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    HV = HV or H
    k = (1 - correlated) * randn(B, T, H, K) + correlated * randn(B, 1, H, K)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (randn(B, T, H, K), k))
    strength = torch.full((B, T, HV), beta, dtype=torch.float64) if beta is not None else randn(B, T, HV).sigmoid()
    return q, k, randn(B, T, HV, V), -decay * randn(B, T, HV).exp(), strength, randn(B, HV, K, V)


def run(form, q, k, v, g, beta, state, dtype=torch.float64):
    with zoo.kernels.use(form):
        q, k, v, g, beta, state = (x.to(dtype) for x in (q, k, v, g, beta, state))
        return gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)


def test_recurrence_is_the_equation():
    """S_t = exp(g) S (I - beta k k^T) + beta v k^T in the paper's layout [V, K], one head, by hand."""
    q, k, v, g, beta, state = inputs(5, B=1, H=1)
    S = state[0, 0].T
    o, final = recurrent(q, k, v, g, beta, 0.5, state)
    for t in range(5):
        kt, vt, b = k[0, t, 0], v[0, t, 0], beta[0, t, 0]
        S = g[0, t, 0].exp() * S @ (torch.eye(16, dtype=torch.float64) - b * torch.outer(kt, kt)) + b * torch.outer(vt, kt)
        torch.testing.assert_close(o[0, t, 0], 0.5 * S @ q[0, t, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final[0, 0], S.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 16, 24, 63, 64, 65, 200])
@pytest.mark.parametrize(
    "case", [{}, {"HV": 6, "H": 2}, {"correlated": 0.95, "beta": 0.9, "decay": 1e-3}, {"decay": 30.0}, {"decay": 0.0, "beta": 2.0}]
)
def test_chunked_equals_recurrence_in_float64(T, case):
    given = inputs(T, **case)
    for found, wanted in zip(run("chunked", *given), run("reference", *given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [7, 64, 200])
def test_what_is_not_recorded_is_the_same_and_leaves_its_inputs_alone(T):
    given, kept = inputs(T), inputs(T)
    recorded = run("chunked", *(x.clone().requires_grad_() for x in given))
    for found, wanted in zip(run("chunked", *given), recorded, strict=True):
        assert torch.equal(found, wanted)
    assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("T", [64, 256])
def test_chunked_in_float32_on_correlated_keys(seed, T):
    """Nearly equal keys, beta 0.9, slow decay: where a series over the whole chunk would explode."""
    given = inputs(T, correlated=0.9, beta=0.9, decay=1e-3, seed=seed, K=32, V=32)
    for found, wanted in zip(run("chunked", *given, dtype=torch.float32), run("reference", *given), strict=True):
        assert (found.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("spike", [10, 1000, 100_000])
def test_small_decays_after_a_strong_one(spike):
    """As exact as without the strong one, whose size a difference of running sums would round to."""
    q, k, v, g, beta, state = inputs(64, correlated=0.9, beta=0.9, decay=1e-3, K=32, V=32)
    g[:, 5] = -spike
    given = q, k, v, g, beta, state
    for found, wanted in zip(run("chunked", *given, dtype=torch.float32), run("reference", *given), strict=True):
        assert (found.double() - wanted).abs().max() <= 4e-6 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("T", [1, 5, 70])
def test_gradients(T):
    given = [x.requires_grad_() for x in inputs(T, B=1, H=1, HV=2, K=4, V=3, correlated=0.8)]
    outputs = {}
    for form in ("chunked", "reference"):
        o, final = run(form, *given)
        outputs[form] = torch.autograd.grad((o * o.detach().cos()).sum() + (final * final.detach().sin()).sum(), given)
    for found, wanted in zip(outputs["chunked"], outputs["reference"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    given = tuple(x.requires_grad_() for x in inputs(9, B=1, H=1, K=3, V=2))
    assert torch.autograd.gradcheck(lambda *x: run("chunked", *x), given)


@pytest.mark.parametrize("C", [4, 8, 16, 32, 64])
def test_inverse(C):
    A = torch.randn(3, 2, C, C, dtype=torch.float64, generator=torch.Generator().manual_seed(C)).tril(-1) / 2
    exact = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + A)
    torch.testing.assert_close(unit_lower_inverse(A), exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(invert_by_blocks(A), exact, rtol=1e-9, atol=1e-9)


def test_a_traced_inverse_is_as_exact():
    """On strongly correlated keys, in float32: the series over all rows would be off by many orders of magnitude."""
    q, k, v, g, beta, state = inputs(192, correlated=0.95, beta=0.9, decay=1e-3, K=32, V=32)
    traced = torch.compile(lambda *x: run("chunked", *x, dtype=torch.float32), fullgraph=True, backend="eager")
    for found, wanted in zip(traced(q, k, v, g, beta, state), run("reference", q, k, v, g, beta, state), strict=True):
        assert (found.double() - wanted).abs().max() <= 4e-6 * wanted.abs().max()


def test_a_compiled_gradient_reads_what_the_forward_pass_kept():
    """In several segments, as of a batch of 16; sizes are fixed, and the forward pass is not run again."""
    values = [x.requires_grad_() for x in inputs(130, B=16)]
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: run("chunked", *x), fullgraph=True, backend="aot_eager", dynamic=False)

    def gradients(form):
        o, final = form(*values)
        return torch.autograd.grad(o.square().sum() + final.sin().sum(), values)

    torch.testing.assert_close(gradients(compiled), gradients(partial(run, "chunked")), rtol=1e-12, atol=1e-12)
    with torch.profiler.profile() as profiled:  # after tracing
        gradients(compiled)
    operators = Counter(event.name for event in profiled.events())
    assert operators["zoo::gated_delta_rule_chunked_recorded"] == operators["zoo::gated_delta_rule_chunked_recorded_backward"] == 1
    assert not operators["zoo::gated_delta_rule_chunked"]


def test_cut_anywhere():
    q, k, v, g, beta, state = inputs(40)
    whole, end = run("chunked", q, k, v, g, beta, state)
    pieces = []
    for part in torch.arange(40).split([1, 13, 2, 24]):
        o, state = run("chunked", q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-10)


def test_arithmetic_is_float32_in_bfloat16():
    given = inputs(70)
    o, final = run("chunked", *given, dtype=torch.bfloat16)
    rounded = [x.bfloat16().double() for x in given]
    wanted, _ = run("reference", *rounded)
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert (o.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()  # one rounding of the result


@pytest.mark.parametrize(
    "change", [{"v": (2, 7, 3, 24)}, {"k": (2, 6, 2, 16)}, {"g": (2, 7, 1)}, {"beta": (2, 6, 2)}, {"state": (2, 2, 24, 16)}]
)
def test_shapes_that_do_not_fit(change):
    given = dict(zip(["q", "k", "v", "g", "beta", "state"], inputs(7), strict=True))
    given.update({name: torch.zeros(shape) for name, shape in change.items()})
    with pytest.raises(ValueError, match="want"):
        gated_delta_rule(given["q"], given["k"], given["v"], g=given["g"], beta=given["beta"], initial_state=given["state"])


def test_unknown_form():
    with pytest.raises(zoo.ZooError, match="did you mean 'reference'"):
        zoo.kernels.use("referense")

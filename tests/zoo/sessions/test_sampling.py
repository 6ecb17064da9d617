"""Sampling against the same rules written in plain Python, token by token."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.config import validate
from zoo.errors import ZooError
from zoo.sessions.sampling import Sampler, Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0], [-1.0, 3.0, 0.0, 0.5, 1.0]])


def by_hand(logits, seen, temperature, top_k, top_p, penalty):
    """Compute the probabilities of one stream."""
    logits = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or len(weights)]
    kept, mass, total = [], 0.0, sum(weights[i] for i in order)
    for i in order:
        if mass < (top_p or 1):
            kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@given(
    st.lists(st.integers(-300, 300), min_size=6, max_size=6, unique=True),
    st.sets(st.integers(0, 5), min_size=1),
    st.floats(0.1, 3),
    st.none() | st.integers(1, 8),
    st.none() | st.floats(0.01, 1),
    st.floats(0.5, 2),
)
@settings(max_examples=60, deadline=None)
def test_probabilities(values, seen, temperature, top_k, top_p, penalty):
    logits = [v / 100 + 0.001 for v in values]
    sampling = Sampling(tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    got = Sampler(sampling, torch.tensor([sorted(seen)]), 6).scores(torch.tensor([logits])).softmax(-1)[0].tolist()
    want = by_hand(logits, seen, temperature, top_k, top_p, penalty)
    assert got == pytest.approx(want, abs=1e-4) or top_p is not None  # a token at the edge of top_p may fall to either side
    assert sum(abs(a - b) > 1e-4 for a, b in zip(got, want, strict=True)) == 0 or _at_the_edge(
        logits, seen, temperature, top_k, top_p, penalty
    )


def _at_the_edge(logits, seen, temperature, top_k, top_p, penalty):
    whole = sorted(by_hand(logits, seen, temperature, top_k, None, penalty), reverse=True)
    return any(abs(sum(whole[:n]) - (top_p or 1)) < 1e-5 for n in range(1, 7))


def test_frequencies():
    sampler = Sampler(Sampling(tokens=1, temperature=0.7, top_k=4, seed=3), torch.zeros(4000, 0, dtype=torch.int64), 5)
    drawn = sampler(LOGITS[:1].expand(4000, 5)).bincount(minlength=5) / 4000
    torch.testing.assert_close(drawn, torch.tensor(by_hand(LOGITS[0].tolist(), (), 0.7, 4, None, 1.0)), atol=0.03, rtol=0)


def test_greedy_and_its_penalty():
    sampler = Sampler(Sampling(tokens=1, repetition_penalty=10.0), torch.zeros(2, 0, dtype=torch.int64), 5)
    assert sampler(LOGITS).tolist() == [0, 1]
    assert sampler(LOGITS).tolist() == [1, 4]  # 2 / 10 < 1 and 3 / 10 < 1
    assert sampler(LOGITS).tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_processor_of_any_dtype(dtype):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Sampling(tokens=1, logits_processor=lambda scores: scores.to(dtype).requires_grad_()), torch.zeros(3, 0).long(), 50)
    assert sampler(logits).tolist() == logits.to(dtype).argmax(-1).tolist()


def test_nan_counts_as_the_largest_logit_as_in_torch():
    logits = LOGITS.clone()
    logits[1, 4] = float("nan")
    assert Sampler(Sampling(tokens=1), torch.zeros(2, 0).long(), 5)(logits).tolist() == logits.argmax(-1).tolist() == [0, 4]


def test_seed():
    def draw(seed):
        sampler = Sampler(Sampling(tokens=1, temperature=1.0, seed=seed), torch.zeros(1, 0, dtype=torch.int64), 5)
        return [int(sampler(LOGITS[:1])) for _ in range(40)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("token", [-1, 5, 2**40])
def test_tokens_outside_the_vocabulary_are_refused(token):
    for field, value in {"stop": (0, token), "logit_bias": {0: 1.0, token: 1.0}}.items():
        with pytest.raises(ZooError, match=f"^{field}: token {token}; the vocabulary is 0 to 4$"):
            Sampler(Sampling(tokens=1, **{field: value}), torch.zeros(1, 0, dtype=torch.int64), 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("presence_penalty", "frequency_penalty") for value in (math.nan, math.inf, -math.inf, 1e39, -1e39)),
        *(("repetition_penalty", value) for value in (math.nan, math.inf, 1e39, 1e-39, 0.0, -1.0)),
        *(("temperature", value) for value in (math.nan, math.inf, 1e39, -1.0)),
        *(("logit_bias", {2: value}) for value in (math.nan, math.inf, 1e39)),
        *((field, math.nan) for field in ("top_p", "min_p")),
    ],
)
def test_numbers_that_would_not_stay_finite_are_refused(field, value):
    with pytest.raises(ZooError, match=f"^generate: {field}(.2)?: .*(want a finite number|must be (less|greater) than)"):
        validate(Sampling, {"tokens": 1, field: value}, "generate")


@pytest.mark.parametrize("largest", [1e30, -1e30])
def test_the_largest_numbers_leave_probabilities(largest):
    how = {"presence_penalty": largest, "frequency_penalty": largest, "logit_bias": {1: largest, 2: -largest}, "temperature": 1e30}
    for penalty in (1e30, 1e-30):
        sampler = Sampler(Sampling(tokens=1, repetition_penalty=penalty, **how), torch.tensor([[0, 3]]), 5)
        for _ in range(3):
            assert 0 <= int(sampler(LOGITS[:1])) < 5
            assert float(sampler.scores(LOGITS[:1]).softmax(-1).sum()) == pytest.approx(1)


class Nothing:
    """A constraint that allows no token."""

    over = False

    def allowed(self):
        return torch.zeros(5, dtype=torch.bool)

    def accept(self, token):
        raise AssertionError("a token that is not allowed")


@pytest.mark.parametrize("bias", [-math.inf, -1e39])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_excludes_a_token_and_never_all(bias, temperature):
    sampler = Sampler(Sampling(tokens=1, temperature=temperature, logit_bias=dict.fromkeys(range(4), bias)), torch.zeros(1, 0).long(), 5)
    assert sampler(LOGITS[:1]).tolist() == [4]
    none = Sampling(tokens=1, temperature=temperature, logit_bias=dict.fromkeys(range(5), bias))
    masked = Sampling(tokens=1, temperature=temperature, logits_processor=lambda scores: torch.full_like(scores, -math.inf))
    forbidden = Sampling(tokens=1, temperature=temperature, constraint=Nothing())
    for sampling in (none, masked, forbidden):
        with pytest.raises(ZooError, match=r"^generate: logit_bias, logits_processor and constraint exclude every token$"):
            Sampler(sampling, torch.zeros(1, 0).long(), 5)(LOGITS[:1])


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (lambda scores: None, "returned NoneType; want a tensor of floats [2, 5]"),
        (lambda scores: scores.numpy(), "returned ndarray; want a tensor of floats [2, 5]"),
        (lambda scores: scores[:, :1], "returned float32 [2, 1]; want a tensor of floats [2, 5]"),
        (lambda scores: scores.argsort(), "returned int64 [2, 5]; want a tensor of floats [2, 5]"),
        (lambda scores: scores.to(torch.complex64), "returned complex64 [2, 5]; want a tensor of floats [2, 5]"),
        (lambda scores: scores.double() * 1e300, "returned a logit that is NaN or +inf; -inf excludes a token"),
        (lambda scores: scores * math.nan, "returned a logit that is NaN or +inf; -inf excludes a token"),
        (lambda scores: scores.masked_fill(scores == 3, math.inf), "returned a logit that is NaN or +inf; -inf excludes a token"),
    ],
)
def test_a_logits_processor_that_does_not_return_logits_is_refused(result, what):
    sampler = Sampler(Sampling(tokens=1, logits_processor=result), torch.zeros(2, 0).long(), 5)
    with pytest.raises(ZooError, match=f"^{re.escape('logits_processor: ' + what)}$"):
        sampler(LOGITS)

"""Sampling against the same rules written in plain Python, token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
def test_the_most_likely_token_of_any_dtype(dtype):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = float("nan")  # counts as the largest, as in torch
    sampler = Sampler(Sampling(tokens=1, logits_processor=lambda scores: scores.to(dtype).requires_grad_()), torch.zeros(3, 0).long(), 50)
    assert sampler(logits).tolist() == [int(logits[0].to(dtype).argmax()), 7, int(logits[2].to(dtype).argmax())]


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

"""Attention as two products, where oneDNN would be slow at torch's own: the same numbers."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.blocks import attention as module
from zoo.blocks.attention import SCORES, attention
from zoo.products import set_precision

MASKS = {
    "all": lambda T, S: None,
    "band": lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T),
    "streams": lambda T, S: torch.ones(1, 1, T, S, dtype=torch.bool).tril(S - T - 1).logical_or(torch.arange(S) == S - T),
}


@pytest.fixture
def own(monkeypatch):
    """Number of calls of torch's attention."""
    made = []
    wanted = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: made.append(1) or wanted(*args, **options))
    return made


@torch.no_grad()
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
@pytest.mark.parametrize(("H", "Hkv"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_products_are_those_of_float64(mask, H, Hkv, scale, own):
    T, S = (9, 9) if mask == "causal" else (3, 9)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, D, generator=generator) for heads, tokens, D in ((H, T, 8), (Hkv, S, 8), (Hkv, S, 5)))
    visible = None if mask == "causal" else MASKS[mask](T, S)
    with set_precision("medium"):
        found = attention(q, k, v, visible, causal=mask == "causal", scale=scale)
    assert not own
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), visible, is_causal=mask == "causal", enable_gqa=True, scale=scale
    )
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("streams", "heads", "tokens", "slots", "dtype", "precision", "calls"),
    [
        (1, 8, 128, 128, torch.float32, "medium", 0),
        (1, 8, 128, 129, torch.float32, "medium", 1),  # more scores than stay in the cache
        (2, 8, 2, 8, torch.float32, "medium", 1),
        (16, 8, 1, 64, torch.float32, "medium", 0),
        (1, 1, 1, SCORES + 1, torch.float32, "medium", 1),
        (1, 8, 2, 8, torch.bfloat16, "medium", 1),
        (1, 8, 2, 8, torch.float64, "medium", 1),
        (1, 8, 2, 8, torch.float32, "highest", 1),
    ],
)
def test_where_torch_attends(streams, heads, tokens, slots, dtype, precision, calls, own):
    q, k = torch.ones(streams, heads, tokens, 4, dtype=dtype), torch.ones(streams, heads, slots, 4, dtype=dtype)
    with set_precision(precision):
        assert torch.allclose(attention(q, k, k), q)
    assert len(own) == calls


def test_gradients_and_compiled_models_use_torch(own):
    q = torch.ones(1, 2, 1, 4, requires_grad=True)
    with set_precision("medium"):
        attention(q, q, q).sum().backward()
        assert len(own) == 1
        with torch.no_grad():
            torch.compile(attention, backend="eager", fullgraph=True)(q, q, q)
    assert q.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("evict", ["hard", "sliding", "none"])
def test_sessions_compute_the_same(evict):
    layers = {"layers": "attn swa gdn", "blocks": {"swa": {"window": 4}}, "window": None if evict == "none" else 8}
    model = zoo.create("gdn4-sleep1", d_model=32, vocab_size=11, evict=evict, **layers)
    ids = torch.arange(23)[None] % 11
    logits = []
    for precision in ("highest", "medium"):
        with set_precision(precision):
            logits.append(zoo.Session(model).feed(ids))
            assert module._is_small(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4)) == (precision == "medium")
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)

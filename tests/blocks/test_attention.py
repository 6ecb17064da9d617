"""Attention in products of our own, where oneDNN would be slow at torch's: the same numbers."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.blocks import attention as module
from zoo.blocks.attention import SCORES, SHORT, attention
from zoo.blocks.one_query import takes_one_query
from zoo.kernels.common.precision import highest_precision
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
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("B", "H", "Hkv"), [(1, 4, 4), (3, 6, 2)])
@pytest.mark.parametrize("S", [1, 9, 600])
@pytest.mark.parametrize("layout", ["whole", "part of a buffer", "by token", "shared", "other steps"])
def test_one_query_is_that_of_float64(mask, B, H, Hkv, S, layout, own):
    generator = torch.Generator().manual_seed(0)

    def cache(D):
        if layout == "part of a buffer":
            return torch.randn(B, Hkv, S + 7, D, generator=generator)[:, :, 3 : 3 + S]
        if layout == "by token":
            return torch.randn(B, S, Hkv, D, generator=generator).transpose(1, 2)
        if layout == "shared":
            return torch.randn(1, Hkv, S, D, generator=generator).expand(B, -1, -1, -1)
        width = D + 1 if layout == "other steps" else D
        return torch.randn(B, Hkv, S, width, generator=generator)[..., :D]

    q, k, v = torch.randn(B, H, 1, 8, generator=generator), cache(8), cache(5)
    assert takes_one_query(k, v) == (layout != "other steps")
    visible = MASKS[mask](1, S)
    with set_precision("medium"):
        found = attention(q, k, v, visible, scale=0.7)
    assert bool(own) == (layout == "other steps" and B > 1)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), visible, enable_gqa=True, scale=0.7)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_many_equal_tokens_lose_no_digits(own):
    """Summing 2**17 equal numbers one after another in float32 would lose two digits."""
    k, v = torch.zeros(1, 1, 1 << 17, 4), torch.full((1, 1, 1 << 17, 4), 1 / 3)
    with set_precision("medium"):
        found = attention(torch.ones(1, 1, 1, 4), k, v)
    assert not own
    torch.testing.assert_close(found, v[:, :, :1], rtol=2e-6, atol=0)


@torch.no_grad()
def test_a_transform_uses_torch(own):
    q = torch.randn(3, 1, 2, 1, 4)
    with set_precision("medium"):
        torch.testing.assert_close(torch.func.vmap(lambda x: attention(x, x, x))(q), q)
    assert own


@torch.no_grad()
@pytest.mark.parametrize(
    ("streams", "heads", "tokens", "slots", "dtype", "precision", "calls"),
    [
        (1, 8, 128, 128, torch.float32, "medium", 0),
        (1, 8, 128, 129, torch.float32, "medium", 1),  # more scores than stay in the cache
        (2, 8, 2, 8, torch.float32, "medium", 1),
        (16, 8, 1, 64, torch.float32, "medium", 0),
        (1, 1, 1, SCORES + 1, torch.float32, "medium", 0),
        (1, 1, 2, SCORES // 2 + 1, torch.float32, "medium", 1),
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


@torch.no_grad()
def test_compiled_models_are_compiled_once():
    """However many keys a cache has come to hold."""
    q, counter = torch.ones(1, 2, 1, 4), CompileCounter()
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    with set_precision("medium"):
        for keys in (100, SHORT, SHORT + 1, 400):
            k = torch.ones(1, 2, keys, 4)
            torch._dynamo.mark_dynamic(k, 2)
            compiled(q, k, k)
    assert counter.frame_count == 1


def trained(function, T, Hkv, mask, causal):
    """Return the result of attention and its gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, T, 16, generator=generator, requires_grad=True) for heads in (4, Hkv, Hkv))
    y = function(q, k, v, mask, causal=causal)
    (y * torch.arange(16)).sum().backward()
    return y.detach(), q.grad, k.grad, v.grad


CASES = [
    (40, 4, None, True),
    (40, 2, None, True),
    (40, 2, torch.ones(40, 40, dtype=torch.bool).tril(-1).logical_or(torch.eye(40) > 0), False),
]


@pytest.mark.parametrize("form", ["eager", "compiled", "recomputed"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_training_multiplies_by_mkl(form, case, own):
    """Under either precision, attention and its gradients are the same to the last bit."""
    forms = {
        "eager": attention,
        "compiled": torch.compile(attention, backend="aot_eager", fullgraph=True),
        "recomputed": lambda *args, **options: checkpoint(attention, *args, **options, use_reentrant=False),
    }
    with set_precision("highest"):
        wanted = trained(attention, *CASES[case])
    assert len(own) == 1
    with set_precision("medium"):
        found = trained(forms[form], *CASES[case])
        assert torch.get_float32_matmul_precision() == "medium"
    assert len(own) == 1
    assert all(map(torch.equal, found, wanted))


def test_training_sets_the_precision_forward_and_backward(monkeypatch):
    """On some CPUs both libraries give the same bits, so that a comparison shows nothing."""
    made, wanted = [], torch.set_float32_matmul_precision
    with set_precision("medium"):
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: made.append(precision) or wanted(precision))
        trained(attention, *CASES[0])
        monkeypatch.undo()
    assert made == ["highest", "medium"] * 2


def test_what_torch_alone_can_differentiate(own):
    """Values of another width, other dtypes, and second derivatives of torch.func; and many keys, which oneDNN multiplies faster."""
    q, v = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 5)
    with set_precision("medium"):
        attention(q, q, v).sum().backward()
        attention(q.double(), q.double(), q.double()).sum().backward()
        torch.func.hessian(lambda x: attention(x, x, x).sum())(q.detach())
        k = torch.randn(1, 2, SHORT + 1, 4)
        attention(q, k, k).sum().backward()
        attention(q, k[:, :, 1:], k[:, :, 1:]).sum().backward()
    assert len(own) == 4


def test_the_precision_of_the_process_returns_when_the_last_thread_leaves():
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with highest_precision():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with set_precision("medium"):
        with highest_precision():
            thread.start()
            assert inside.wait(10)
        assert torch.get_float32_matmul_precision() == "highest"
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "medium"


@torch.no_grad()
@pytest.mark.parametrize("evict", ["hard", "sliding", "none"])
def test_sessions_compute_the_same(evict):
    layers = {"layers": "attn swa gdn", "blocks": {"swa": {"window": 4}}, "window": None if evict == "none" else 8}
    model = zoo.create("gdn4-sleep1", d_model=32, vocab_size=11, evict=evict, **layers)
    ids = torch.arange(23)[None] % 11
    logits = []
    for precision in ("highest", "medium"):
        with set_precision(precision):
            session = zoo.Session(model)
            logits.append(torch.cat([session.feed(ids[:, :9]), *(session.feed(token) for token in ids[:, 9:].split(1, dim=1))], dim=1))
            assert module._multiplies_slowly(torch.ones(1, 1, 1, 4)) == (precision == "medium")
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)

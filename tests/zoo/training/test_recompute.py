"""Activation recomputation changes no gradient, and memory grows only by what is stored between passes."""

import pytest
import torch

import zoo
from benchmarks.training_memory import Live

L = 6


def gradients(model, ids, mask, **options):
    model.zero_grad()
    answers = model.answers(ids, mask, **options)
    loss = answers.losses().mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def data(chunks, batch=2, every=False, width=L):
    ids = torch.randint(11, (batch, chunks * width), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 1 if every else -width + 1 :] = True
    return ids, mask


MODELS = {
    "hard": {"layers": "attn gdn jet"},
    "sliding": {"layers": "swa gdn attn", "evict": "sliding"},
    "every pass from the same fast weights": {"layers": "gdn attn gdn", "span": (1, 2), "carry": False},
    "inner span, injected, normed": {"layers": "gdn attn gdn attn", "span": (1, 2), "inject": True, "loop_norm": True},
    "embedded again in every pass": {"layers": "attn gdn attn gdn", "span": (1, 3), "feed_back": False},
    "residual gates": {"layers": "gdn attn gdn", "span": (0, 1), "residual_gates": 2},
    "bounded injection": {"layers": "attn gdn", "inject": "bounded"},
    "every": {"layers": "attn jet", "sleep_on": "every"},
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same(name):
    model = zoo.create(f"gdn4-sleep3-hard{L}", d_model=16, d_ff=16, vocab_size=11, dtype=torch.float64, **MODELS[name])
    if model.config.inject:
        torch.nn.init.normal_(model.inject)
    if model.config.residual_gates:
        torch.nn.init.normal_(model.residual_gates)
    ids, mask = data(4, every=name == "every")
    loss, plain = gradients(model, ids, mask)
    for recompute in ("passes", "chunks"):
        again, remade = gradients(model, ids, mask, recompute=recompute)
        assert again == loss
        assert plain.keys() == remade.keys()
        assert all(torch.allclose(plain[n], remade[n], rtol=0, atol=1e-12) for n in plain), recompute


def most_alive(chunks, loops, recompute, batch=4, width=16):
    model = zoo.create(f"gdn4-sleep{loops}-hard{width}", layers="attn gdn", d_model=32, d_ff=64, vocab_size=11)
    ids, mask = data(chunks, batch, width=width)
    with Live() as live:
        gradients(model, ids, mask, recompute=recompute)
    state = sum(s.nbytes for s in model.init_state(batch).fast if s is not None)
    return live.peak, batch * width * 32 * 4, state


@pytest.mark.parametrize("recompute", ["passes", "chunks"])
def test_memory_grows_only_by_what_is_stored_between_passes(recompute):
    """Each further chunk and pass stores hidden states and fast weights between passes ("passes"), or only the state at the
    start of a chunk ("chunks"), with a small allowance for masks and the like."""
    base, hidden, state = most_alive(3, 2, recompute)
    longer, *_ = most_alive(7, 2, recompute)
    deeper, *_ = most_alive(3, 6, recompute)
    without, *_ = most_alive(3, 2, "nothing")
    small = hidden
    if recompute == "passes":
        assert longer - base <= 4 * (2 * (hidden + state) + small)
        assert deeper - base <= 4 * 2 * (hidden + state + small)
    else:
        assert longer - base <= 4 * (state + small)
        assert deeper - base <= 4 * (hidden + state + small)
    assert base < without


def test_backward_chunks_cuts_the_gradient():
    """The last k chunks are trained as if the state before them were a constant."""
    model = zoo.create(f"gdn4-sleep2-hard{L}", layers="attn gdn", d_model=16, d_ff=16, vocab_size=11, dtype=torch.float64)
    ids, mask = data(5)
    whole, _ = gradients(model, ids, mask)
    for k in (1, 2, 3):
        with torch.no_grad():
            state = model.init_state(2)
            for chunk in ids[:, : (5 - k) * L].split(L, dim=1):
                state = model.consolidate(chunk, state)
        model.zero_grad()
        for chunk in ids[:, :-L].split(L, dim=1)[5 - k :]:
            state = model.consolidate(chunk, state)
        logits = model(ids[:, -L:], state).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 - L :].flatten()).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        loss, found = gradients(model, ids, mask, backward_chunks=k)
        assert loss == whole
        assert all(torch.allclose(expected[n], found[n], rtol=0, atol=1e-12) for n in expected), k

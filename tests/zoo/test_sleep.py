"""Consolidation, eviction and the loss of Algorithm 1, checked against tests/naive.py in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import zoo
from tests.naive import NaiveStream
from zoo.sessions import sliced

TINY = {
    "d_model": 16,
    "d_ff": 24,
    "vocab_size": 11,
    "blocks": {"attn": {"heads": 2}, "swa": {"heads": 2, "window": 3}, "gdn": {"heads": 2}},
}


def tiny(name="gdn4-sleep3-hard6", seed=0, dtype=torch.float64, **overrides):
    model = zoo.create(name, dtype=dtype, seed=seed, **{**TINY, **overrides})
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():  # no parameter may sit at a value that hides a mistake, such as one or zero
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=dtype, generator=generator))
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Whether two trees of tensors are equal bit for bit."""
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*leaves, strict=True)
    )


def assert_same_stream(model, naive_streams, state):
    for i, fast in enumerate(state.fast):
        if fast is not None:
            torch.testing.assert_close(fast, torch.stack([n.S[i] for n in naive_streams]), rtol=1e-9, atol=1e-9)


VARIANTS = [
    {},
    {"span": (1, 2)},
    {"span": (1, 1), "layers": "swa gdn attn gdn"},
    {"layers": "gdn swa*2", "span": (0, 1)},
    {"inject": True},
    {"inject": "bounded", "loop_norm": True, "span": (1, 3)},
    {"feed_back": False},
    {"feed_back": False, "span": (1, 2)},
    {"carry": False, "span": (1, 2)},
    {"loop_norm": True, "tie_embeddings": True},
    {"residual_gates": 2, "inject": True},
    {"residual_gates": 5, "loop_norm": True, "span": (1, 2)},
    {
        "blocks": {
            **TINY["blocks"],
            "attn": {"heads": 4, "kv_heads": 2, "head_dim": 6},
            "gdn": {"heads": 3, "head_dim": 4, "expand_v": 1.5, "conv_size": 2},
        }
    },
]
RESTARTING = {"learned_positions": True, "blocks": {**TINY["blocks"], "gdn": {"heads": 2, "conv_init": "identity", "decay_init": 1}}}
PLACED_ASLEEP = {"learned_positions": "asleep"}


@pytest.mark.parametrize(
    ("evict", "overrides"), [("hard6", v) for v in (*VARIANTS, RESTARTING, PLACED_ASLEEP)] + [("slide6", v) for v in VARIANTS]
)
def test_stream_equals_the_equations(evict, overrides):
    model = tiny(f"gdn4-sleep3-{evict}", **overrides)
    ids = tokens(2, 20)
    naive = [NaiveStream(model) for _ in ids]
    state = model.init_state(2)
    for a, b, asleep in [(0, 6, True), (6, 10, True), (10, 16, True), (16, 20, False)]:
        if asleep:
            state = model.consolidate(ids[:, a:b], state)
            for stream, row in zip(naive, ids, strict=True):
                stream.asleep(row[a:b])
        else:
            logits, state = model(ids[:, a:b], state)
            expected = torch.stack([stream.awake(row[a:b]) for stream, row in zip(naive, ids, strict=True)])
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        assert_same_stream(model, naive, state)
        assert state.position == naive[0].position


@torch.no_grad()
@pytest.mark.parametrize("evict", ["hard6", "slide6"])
def test_residual_gates_of_zero_have_no_effect(evict):
    plain = zoo.create(f"gdn4-sleep3-{evict}", **TINY)
    gated = zoo.create(f"gdn4-sleep3-{evict}", **TINY, residual_gates=2)
    assert (gated.residual_gates == 0).all()
    ids = tokens(2, 6)
    states = [model.consolidate(ids) for model in (plain, gated)]
    assert same(*states)
    assert same(*(model(tokens(2, 3, seed=1), states[0]) for model in (plain, gated)))


@pytest.mark.parametrize("name", ["gdn4-sleep1-hard6", "gdn4-sleep1-slide6", "gdn4-sleep1-full"])
def test_one_loop_is_the_wake_pass_bit_for_bit(name):
    model = tiny(name, dtype=torch.float32, span=(1, 2))
    state = model.consolidate(tokens(2, 6, seed=5))
    ids = tokens(2, 6)
    asleep, awake = model.consolidate(ids, state), model.evict(model(ids, state).state)
    assert same(asleep, awake)


@pytest.mark.parametrize("cuts", [[1] * 40, [39, 1], [7, 1, 20, 12], [3, 3, 34]])
@pytest.mark.parametrize("layers", ["(attn gdn)*2", "swa gdn"])
def test_a_stream_under_none_may_be_cut_anywhere(cuts, layers):
    model = tiny("gdn4", dtype=torch.float32, layers=layers)
    ids, state, pieces = tokens(2, 40), None, []
    for piece in ids.split(cuts, dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_sliding_with_one_loop_is_a_sliding_window_model():
    sleeping = tiny("gdn4-sleep1-slide6")
    ordinary = tiny("gdn4", layers="(swa gdn)*2", blocks={**TINY["blocks"], "swa": {"heads": 2, "window": 6}})
    ordinary.load_state_dict(sleeping.state_dict())
    ids, state = tokens(2, 21), None
    for piece in ids[:, :18].split(6, dim=1):
        state = sleeping.consolidate(piece, state)
    torch.testing.assert_close(sleeping(ids[:, 18:], state).logits, ordinary(ids).logits[:, 18:], rtol=1e-10, atol=1e-10)


def test_hard_eviction_leaves_only_the_fast_weights():
    model = tiny()
    state = model.consolidate(tokens(2, 6))
    fresh = model.init_state(2)
    assert state.position == 0
    assert same(state.window, fresh.window)
    assert not torch.equal(state.fast[1], fresh.fast[1])


def test_sliding_eviction_keeps_the_newest_tokens():
    model = tiny("gdn4-sleep2-slide6")
    state = model.consolidate(tokens(2, 6))
    assert state.window[0].key.shape[2] == 5
    assert state.position == 6
    state = model.consolidate(tokens(2, 2, seed=1), state)
    assert state.window[0].key.shape[2] == 5


def test_consolidate_is_pure_and_deterministic():
    model = tiny("gdn4-sleep3-slide6")
    start = model.consolidate(tokens(2, 6))
    before = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (start, dict(model.state_dict())))
    first, second = (model.consolidate(tokens(2, 6, seed=3), start) for _ in range(2))
    assert same(first, second)
    assert same(before, (start, dict(model.state_dict())))


def test_the_fast_weights_are_float32_in_a_bfloat16_model():
    model = tiny(dtype=torch.bfloat16)
    state = model.consolidate(tokens(1, 6))
    assert state.fast[1].dtype == torch.float32
    assert model(tokens(1, 3), state).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("evict", ["hard4", "slide4"])
def test_loss_of_algorithm_1(evict):
    """Chunks of 4: two consolidated, then two awake, the first of which predicts the first token of the second."""
    model = tiny(f"gdn4-sleep3-{evict}")
    ids = tokens(2, 15)
    mask = torch.zeros(2, 15, dtype=torch.bool)
    mask[0, 10:], mask[1, 9], mask[1, 12] = True, True, True
    terms = []
    for row, supervised in zip(ids, mask, strict=True):
        stream = NaiveStream(model)
        stream.asleep(row[:4])
        stream.asleep(row[4:8])
        logits = stream.awake(row[8:12])
        stream.evict()
        logits = torch.cat([logits, stream.awake(row[12:])])
        terms += [-logits[t - 9].log_softmax(-1)[row[t]] for t in range(9, 15) if supervised[t]]
    torch.testing.assert_close(model.loss(ids, mask), torch.stack(terms).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("evict", ["hard4", "slide4"])
def test_sleep_on_every_chunk_is_what_a_session_does(evict):
    model = tiny(f"gdn4-sleep3-{evict}", sleep_on="every")
    ids = tokens(2, 15)
    session, logits = zoo.Session(model, batch_size=2), []
    for piece in ids.split([1, 5, 3, 6], dim=1):
        logits.append(session.feed(piece))
    expected = F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(ids, torch.ones_like(ids)), expected, rtol=1e-9, atol=1e-9)
    stream = NaiveStream(model)
    naive = []
    for piece in ids[0].split(4):
        before = {"S": dict(stream.S), "cache": dict(stream.cache), "position": stream.position}
        naive.append(stream.awake(piece))
        vars(stream).update(before)
        stream.asleep(piece)
    torch.testing.assert_close(torch.cat(logits, 1)[0], torch.cat(naive), rtol=1e-9, atol=1e-9)


def blocks_run(model, work):
    """Return the result of `work()` and the number of blocks that it ran."""
    seen = []
    hooks = [block.register_forward_hook(lambda *_: seen.append(1)) for block in model.blocks]
    try:
        return work(), len(seen)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("evict", ["hard6", "slide6"])
@pytest.mark.parametrize("overrides", [*(v for v in (*VARIANTS, RESTARTING) if "span" not in v), {"carry": False}], ids=str)
@pytest.mark.parametrize("loops", [1, 3])
def test_a_sleep_that_starts_from_the_wake_pass(loops, overrides, evict):
    """A sleep that starts from the wake pass runs one pass less and ends in the same state, bit for bit."""
    if overrides is RESTARTING and evict != "hard6":
        return
    model = tiny(f"gdn4-sleep3-{evict}", **overrides)
    start, ids = model.consolidate(tokens(2, 6, seed=1)), tokens(2, 5)
    awake = model.wake(ids, start)
    state, run = blocks_run(model, lambda: model.consolidate(ids, start, loops=loops, awake=awake))
    assert run == (loops - 1) * len(model.blocks)
    assert same(state, model.consolidate(ids, start, loops=loops))
    in_slices, _ = by_slices(sliced.consolidate(model, ids, start, loops=loops, awake=awake), [None]) if loops > 1 else (state, 0)
    assert same(in_slices, state)


@pytest.mark.parametrize("overrides", [{"span": (1, 2)}, PLACED_ASLEEP])
def test_a_wake_pass_that_is_no_pass_of_a_sleep(overrides):
    model = tiny("gdn4-sleep2-hard6", **overrides)
    with pytest.raises(zoo.ZooError, match="awake: the wake pass of gdn4-sleep2-hard6 is not the first pass of a sleep"):
        model.consolidate(tokens(1, 6), awake=model.wake(tokens(1, 6)))


@pytest.mark.parametrize(("recompute", "passes"), [("nothing", 3), ("chunks", 4)])
@pytest.mark.parametrize("span", [None, (1, 2)])
def test_training_on_every_chunk_runs_the_first_pass_once(span, recompute, passes):
    """With three loops, the first is the wake pass if the span is every block; the gradients are the same."""
    model = tiny("gdn4-sleep3-hard4", sleep_on="every", span=span)
    ids, mask = tokens(2, 8), torch.ones(2, 8)
    answers, run = blocks_run(model, lambda: model.answers(ids, mask, recompute=recompute))
    assert run == (4 * passes + 4 if span is None else 4 + (2 + 3 * 2) + 4)
    gradients = torch.autograd.grad(answers.losses().mean(), list(model.parameters()))
    twin = tiny("gdn4-sleep3-hard4", sleep_on="every", span=span)
    state, hidden = twin.init_state(2), []
    for chunk in ids.split(4, dim=1):
        hidden.append(twin.wake(chunk, state)[0])
        state = twin.consolidate(chunk, state)
    loss = F.cross_entropy(twin.logits(torch.cat(hidden, dim=1))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    wanted = torch.autograd.grad(loss, list(twin.parameters()))
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_first_token_after_a_sleep_carries_no_loss():
    model = tiny("gdn4-sleep2-hard4")
    ids, mask = tokens(2, 8), torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 6] = True
    without = model.loss(ids, mask)
    mask[:, 4] = True
    assert torch.equal(model.loss(ids, mask), without)


@pytest.mark.parametrize("evict", ["hard4", "slide4"])
@pytest.mark.parametrize("sleep_on", ["unsupervised", "every"])
@pytest.mark.parametrize(("columns", "read"), [([6, 10], 10), ([6, 7, 8], 8), ([5, 12], 12), ([2, 8], 8)])
def test_what_follows_the_last_supervised_token_is_not_run(evict, sleep_on, columns, read):
    """Nor that token itself. What it is, and how long the sequence is, does not change the loss."""
    model = tiny(f"gdn4-sleep2-{evict}", sleep_on=sleep_on)
    ids, mask = tokens(2, 15), torch.zeros(2, 15, dtype=torch.bool)
    mask[:, columns] = True
    counted = []
    handle = model.blocks[0].register_forward_hook(lambda block, inputs, output: counted.append(inputs[0].shape[1]))
    loss = model.loss(ids, mask)
    handle.remove()
    assert sum(counted) >= read
    assert counted[-1] == (read - 1) % 4 + 1 or columns == [2, 8]  # a token after a sleep has no prediction
    changed = ids.clone()
    changed[:, read + 1 :] = (ids[:, read + 1 :] + 1) % 5
    assert torch.equal(model.loss(changed, mask), loss)
    assert torch.equal(model.loss(ids[:, : read + 1], mask[:, : read + 1]), loss)


INNER = {"span": (1, 1), "inject": True, "loop_norm": True, "residual_gates": 2}
SLEEPS = [
    ("hard3", {}),
    ("slide3", INNER),
    *(pytest.param(*case, marks=pytest.mark.extended) for case in (("hard3", INNER), ("slide3", {}))),
]


@pytest.mark.parametrize(("evict", "overrides"), SLEEPS)
def test_gradient_of_the_loss(evict, overrides):
    """Compare the gradient of every parameter with finite differences, for three chunks and three loops."""
    model = tiny(
        f"gdn4-sleep3-{evict}",
        d_model=4,
        d_ff=6,
        vocab_size=5,
        layers="attn gdn",
        blocks={"attn": {"heads": 1}, "gdn": {"heads": 1}},
        **overrides,
    )
    ids, mask = tokens(1, 9) % 5, torch.zeros(1, 9, dtype=torch.bool)
    mask[:, 7:] = True
    names = [name for name, _ in model.named_parameters()]

    def loss(*parameters):
        return torch.func.functional_call(_Loss(model), {f"model.{n}": p for n, p in zip(names, parameters, strict=True)}, (ids, mask))

    assert torch.autograd.gradcheck(loss, tuple(p.detach().clone().requires_grad_() for p in model.parameters()), fast_mode=True)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model.loss(ids, mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(1, 7)), "7 tokens do not fit into a window of 6 that holds 0"),
        (lambda m: m(tokens(1, 3), m(tokens(1, 4)).state), "3 tokens do not fit into a window of 6 that holds 4"),
        (lambda m: m(tokens(1, 1), m(tokens(1, 6)).state), "1 token does not fit into a window of 6 that holds 6"),
        (lambda m: m.consolidate(tokens(1, 7)), "7 tokens are more than one window of 6"),
        (lambda m: m.consolidate(tokens(1, 6), loops=0), "loops: 0 must be at least 1"),
        (lambda m: m(tokens(1, 0)), "at least one token"),
        (lambda m: m.loss(tokens(2, 12), torch.ones(2, 11)), "loss_mask"),
        (lambda m: m.loss(tokens(2, 12), torch.zeros(2, 12)), "no token that can be predicted"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(zoo.ZooError, match=message):
        call(tiny("gdn4-sleep2-hard6"))


def by_slices(work, sizes):
    """Run `work` in slices of at most these sizes, over and over. Returns its result and the number of slices."""
    work.send(None)
    for slices, most in enumerate(itertools.cycle(sizes), 1):
        try:
            work.send(most)
        except StopIteration as done:
            return done.value, slices


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[None], [1], [4, None, 2, 7]])
@pytest.mark.parametrize("evict", ["hard6", "slide6", "full"])
@pytest.mark.parametrize(
    "fields",
    [*VARIANTS, RESTARTING, {"layers": "swa*2", "wake_loops": 3}, {"layers": "mamba jet mamba2", "blocks": {"mamba2": {"head_dim": 8}}}],
    ids=str,
)
def test_in_slices(fields, evict, sizes):
    """For any sizes of slices, a wake pass and a sleep return the same as in one piece."""
    if (fields is RESTARTING and evict != "hard6") or ("wake_loops" in fields and evict != "full"):
        return
    model = tiny(f"gdn4-sleep{1 if evict == 'full' else 3}-{evict}", **fields)
    start = model.init_state(2) if evict == "full" else model.consolidate(tokens(2, 5))
    state = model(tokens(2, 3), start).state
    read, slices = by_slices(sliced.wake(model, tokens(2, 3, seed=1), state), sizes)
    torch.testing.assert_close(read, model(tokens(2, 3, seed=1), state), rtol=1e-9, atol=1e-9)
    blocks = len(model.blocks) * model.config.wake_loops + 1  # and the head
    assert slices == {1: blocks * 3, 4: blocks + (blocks + 1) // 4}.get(sizes[0], blocks)
    if evict != "full":
        slept, _ = by_slices(sliced.consolidate(model, tokens(2, 6, seed=2), start, loops=2), sizes)
        torch.testing.assert_close(slept, model.consolidate(tokens(2, 6, seed=2), start, loops=2), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "last"),
    [
        ({"layers": "gdn attn gdn attn"}, [(0, None), (1, None), (2, 0)]),
        ({"layers": "attn gdn attn gdn"}, [(0, None), (1, None), (2, None), (3, 0)]),
        ({"layers": "gdn attn gdn attn", "span": (0, 1)}, [(0, None), (1, None), (2, 0)]),
        ({"layers": "attn gdn swa*2", "span": (0, 0)}, [(0, None), (1, 0)]),
        ({"layers": "gdn swa*2", "span": (1, 2)}, [(0, 0)]),
    ],
)
def test_nothing_runs_after_the_last_fast_weights_of_a_sleep_that_empties_the_window(fields, last):
    """The state equals, bit for bit, that of a sleep which runs every block; under `sliding`, and awake, every block runs."""
    model, ids = tiny("gdn4-sleep3-hard6", dtype=torch.float32, **fields), tokens(2, 6)
    start = model.consolidate(tokens(2, 6, seed=1))
    assert model.passes(3, asleep=True)[-1] == last
    h, state, positions, _ = model.start_sleep(ids, start)
    assert same(model.consolidate(ids, start), model.evict(model.run(h, state, positions, model.passes(3))[1]))
    sliding = tiny("gdn4-sleep3-slide6", **fields)
    assert sliding.passes(3, asleep=True) == sliding.passes(3) == model.passes(3)
    mlps = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: mlps.append(1))
    model(ids)
    assert len(mlps) == len(model.blocks)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((2, 12), 0.5), "loss_mask: 0.5 to 0.5; allowed: bool, or 0 and 1"),
        (torch.full((2, 12), 2), "loss_mask: 2 to 2; allowed"),
        (
            torch.ones(2, 12),
            "loss_mask: every window carries loss, so gdn4-sleep2-hard6 would never sleep; create it with sleep_on 'every'",
        ),
    ],
)
def test_masks_that_cannot_be_meant(mask, message):
    with pytest.raises(zoo.ZooError, match=message):
        tiny("gdn4-sleep2-hard6").loss(tokens(2, 12), mask)


def test_masked_labels_in_ids_are_refused():
    with pytest.raises(zoo.ZooError, match="ids: -100 is not a token id"):
        tiny("gdn4-sleep2-hard6", sleep_on="every").loss(tokens(2, 12).where(torch.arange(12) > 3, -100), torch.ones(2, 12))

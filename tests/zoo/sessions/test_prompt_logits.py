"""A prompt costs the head on its last token alone, wherever it is read; what asks for more logits receives them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import zoo
from zoo.serving.kept import KeptSession
from zoo.serving.prefixes import Prefixes
from zoo.sessions import scheduler, sliced

IDS = torch.randint(11, (1, 23), generator=torch.Generator().manual_seed(0))
SMALL = {"layers": "attn gdn", "d_model": 32, "d_ff": 16, "vocab_size": 11, "blocks": {"attn": {"heads": 2}, "gdn": {"heads": 2}}}


def model(name="gdn4-sleep2-hard8", **fields):
    return zoo.create(name, **{**SMALL, **fields})


def head_rows(model):
    """List to which every call of the head adds its number of rows."""
    rows = []
    model.head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    return rows


def in_pool(runner, prompt, tokens):
    with zoo.SessionPool(runner, context=64) as pool:
        return list(pool.open().generate(prompt, tokens))


def alone(runner, prompt, tokens):
    return list(zoo.Session(runner).generate(prompt, tokens))


class Wrapper(nn.Module):
    """A module around a model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.init_state, self.wakes_as_it_sleeps = model, model.config, model.init_state, False

    def forward(self, *args, **options):
        return self.model(*args, **options)


class Narrow(Wrapper):
    """One that takes no other arguments than these."""

    def forward(self, ids, state):
        return self.model(ids, state)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("read", [alone, in_pool])
@pytest.mark.parametrize("name", ["gdn4-sleep2-hard8", "gdn4-sleep1-hard8", "gdn4-sleep2-slide8", "gdn4-full"])
def test_one_row_for_a_prompt_of_any_number_of_windows(name, read, tied, monkeypatch):
    monkeypatch.setattr(scheduler, "LONG_SLICE", 5)
    ours = model(name, tie_embeddings=tied)
    logits = zoo.Session(ours).feed(IDS)  # of every token
    assert logits.shape == (1, 23, 11)
    rows = head_rows(ours)
    assert read(ours, IDS, 3)[0] == logits[0, -1].argmax()
    assert rows == [1, 1, 1]


@pytest.mark.parametrize(
    ("wrap", "expected"), [(Wrapper, 1), (Narrow, 23), pytest.param(partial(torch.compile, backend="eager"), 1, marks=pytest.mark.extended)]
)
def test_a_wrapper_that_takes_the_argument(wrap, expected):
    ours = model("gdn4-full")
    want, rows = ours(IDS).logits[0, -1].argmax(), head_rows(ours)
    assert alone(wrap(ours), IDS, 1) == [want]
    assert rows == [expected]


def test_wake_loops_need_the_head_once():
    ours = model("gdn4-full", layers="attn attn", wake_loops=2, blocks={"attn": {"heads": 2}})
    want, rows = ours(IDS).logits[0, -1].argmax(), head_rows(ours)
    assert alone(ours, IDS, 1) == in_pool(ours, IDS, 1) == [want]
    assert rows == [1, 1]


def test_tokens_read_again_after_a_background_sleep_need_one_row():
    ours = model()
    stream, rows = zoo.Session(ours), head_rows(ours)
    stream.read(IDS[:, :4])
    sleeping = stream._stream
    stream.sleep(wait=False)
    sleeping.sleep.ended.wait()
    stream.read(IDS[:, 4:7])
    assert sum(rows) <= 3


def test_a_read_that_fails_between_windows(tmp_path):
    """It holds what it has read. There is no next token yet, and the rest can be read."""
    ours = model()
    stream, whole = zoo.Session(ours), zoo.Session(ours)
    forward, calls = ours.blocks[1].forward, []

    def fails_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    ours.blocks[1].forward = fails_once
    with pytest.raises(RuntimeError, match="out of memory"):
        stream.read(IDS)
    assert stream.stats().tokens == 8
    with pytest.raises(zoo.ZooError, match="prompt: None; the last call was interrupted"):
        stream.generate(None, 1)
    stream.save(tmp_path / "stream")
    again = zoo.Session(ours).load(tmp_path / "stream")
    want = whole.feed(IDS)
    for each in (stream, again):
        torch.testing.assert_close(each.feed(IDS[:, 8:]), want[:, 8:])


FORMS = {
    "plain": {},
    "no MLP last": {"mlp": "swiglu none"},
    "wake loops": {"layers": "attn attn", "wake_loops": 2, "residual_gates": 2, "blocks": {"attn": {"heads": 2}}},
    "exit": {"layers": "attn attn", "wake_loops": 2, "exit": {}, "blocks": {"attn": {"heads": 2}}},
    "coda": {"span": (0, 0)},
    "post-norm": {"blocks": {"attn": {"heads": 2}, "gdn": {"heads": 2, "post_norm": True, "residual_in_fp32": True}}},
}


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1, 5, 23])
@pytest.mark.parametrize("form", FORMS)
def test_logits_to_keep(form, keep):
    """The last MLP runs on these tokens alone."""
    ours = model("gdn4-full", **FORMS[form])
    rows = []
    if ours.blocks[1].mlp is not None:
        ours.blocks[1].mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    whole, some = ours(IDS), ours(IDS, logits_to_keep=keep)
    assert not rows or rows == [23] * (2 * ours.config.wake_loops - 1) + [keep] * (keep > 0)
    torch.testing.assert_close(some.logits, whole.logits[:, 23 - keep :])
    assert all(map(torch.equal, filter(torch.is_tensor, some.state.fast), filter(torch.is_tensor, whole.state.fast)))
    for most in (1, 4, 23):
        sliced_logits, state = in_slices(sliced.wake(ours, IDS, logits_to_keep=keep), most)
        torch.testing.assert_close(sliced_logits, some.logits)
        assert state.position == some.state.position
        for ours_after, after in zip(tree_leaves(state), tree_leaves(some.state), strict=True):
            torch.testing.assert_close(ours_after, after)


def in_slices(work, most):
    try:
        work.send(None)
        while True:
            work.send(most)
    except StopIteration as done:
        return done.value


@pytest.mark.parametrize("keep", [-1, 24, 1.0, True, "1"])
def test_a_wrong_number_of_logits(keep):
    with pytest.raises(zoo.ZooError, match=r"logits_to_keep: .*; want an integer from 0 to the number of tokens, 23"):
        model("gdn4-full")(IDS, logits_to_keep=keep)


def test_a_prompt_in_the_server():
    """A row for each state that is kept; log-probabilities of a prompt need all of them."""
    ours = model()
    stream = zoo.Session(ours)
    kept = KeptSession(stream, Prefixes(2**20), stream.snapshot(), "me", None)
    rows, ids = head_rows(ours), IDS[0].tolist()
    kept.read(ids, lambda: [10])
    assert rows == [1, 1]
    scored = list(kept.score(ids))
    assert sum(rows) == 2 + 23
    want = zoo.Session(ours).feed(IDS)[0]
    assert [token for token, _ in scored] == ids
    assert scored[0][1] is None
    torch.testing.assert_close(torch.stack([logits for _, logits in scored[1:]]), want[:-1])

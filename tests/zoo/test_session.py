"""Sessions: any cut of a stream gives the same logits, and generation continues it."""

import pytest
import torch

import zoo


def session(name="gdn4-sleep2-hard6", batch_size=2):
    return zoo.Session(zoo.create(name, layers="attn gdn", d_model=16, vocab_size=11), batch_size)


@pytest.mark.parametrize("name", ["gdn4-sleep2-hard6", "gdn4-sleep2-slide6", "gdn4"])
@pytest.mark.parametrize("cuts", [[1] * 20, [6, 6, 6, 2], [5, 8, 7]])
def test_any_cut(name, cuts):
    ids = torch.randint(0, 11, (2, 20))
    whole, pieces = session(name), session(name)
    torch.testing.assert_close(torch.cat([pieces.feed(p) for p in ids.split(cuts, dim=1)], 1), whole.feed(ids), rtol=1e-5, atol=1e-5)


def test_a_full_window_sleeps_when_the_next_token_comes():
    stream = session()
    ids = torch.randint(0, 11, (2, 6))
    stream.feed(ids)
    assert stream.state.position == 6
    awake = stream.state
    stream.sleep()
    assert stream.state.position == 0
    assert torch.equal(stream.state.fast[1], stream.model.consolidate(ids, stream.model.init_state(2)).fast[1])
    assert not torch.equal(stream.state.fast[1], awake.fast[1])
    asleep = stream.state
    stream.sleep()  # nothing to sleep on
    assert stream.state is asleep


def test_sleeping_early_evicts_what_there_is():
    stream = session()
    stream.feed(torch.randint(0, 11, (2, 4)))
    stream.sleep()
    stream.feed(torch.randint(0, 11, (2, 6)))
    assert stream.state.position == 6


def test_generate_is_greedy():
    stream, manual = session(), session()
    prompt = torch.randint(0, 11, (2, 5))
    made = stream.generate(prompt, 9)
    token, expected = manual.feed(prompt)[:, -1:].argmax(-1), []
    for _ in range(9):
        expected.append(token)
        token = manual.feed(token)[:, -1:].argmax(-1)
    assert torch.equal(made, torch.cat(expected, 1))
    with pytest.raises(zoo.ZooError, match="tokens: 0"):
        stream.generate(prompt, 0)

"""Sessions on the graphs agree with PyTorch sessions."""

from __future__ import annotations

import copy
import json
from functools import partial

import onnx
import pytest
import torch
from torch.utils._pytree import tree_map

import zoo
from tests.export.conftest import CASES, FORMS, MORE
from zoo.errors import ZooError
from zoo.export.ring import PAST, PRESENT, pack
from zoo.export.runtime import ExportedModel
from zoo.export.verify import SLEEP, STRESS, TOLERANCE, verify
from zoo.export.verify import stream as verify_stream
from zoo.sessions.rows import Rows

OF_EVERY_KIND = [*CASES, *FORMS, *(pytest.param(case, marks=pytest.mark.extended) for case in MORE if case != "ourojet-loud")]


def stream(model, batch, tokens):
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_that_sleeps(bundle, batch):
    ours, wanted = zoo.export.load(bundle.folder, batch_size=batch), zoo.Session(bundle.model, batch)
    ids = stream(bundle.model, batch, 4 * bundle.model.config.window + 2)
    assert torch.allclose(ours.feed(ids), wanted.feed(ids), atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_sleeping_early(bundle, batch):
    ours, wanted = zoo.export.load(bundle.folder, batch_size=batch), zoo.Session(bundle.model, batch)
    window = bundle.model.config.window
    ids = stream(bundle.model, batch, 6 * window)
    for tokens in (window, 2, 1, window - 1, window + 1, window):
        now, ids = ids[:, :tokens], ids[:, tokens:]
        assert torch.allclose(ours.feed(now), wanted.feed(now), atol=1e-4)
        ours.sleep()
        wanted.sleep()
        for name, tensor in pack(wanted.state, PAST).items():
            if name.endswith(("recurrent_state", "conv_state")):
                assert torch.allclose(pack(ours.state, PAST)[name], tensor, atol=1e-4), name
    assert all(map(torch.equal, ours.generate(ids[:, :1], 2 * window), wanted.generate(ids[:, :1], 2 * window)))


def test_the_content_of_padding_does_not_matter(bundle):
    exported = ExportedModel(bundle.folder)
    graph = exported._graphs["consolidation.onnx"]
    window = exported.config.window
    ids = stream(bundle.model, 2, window)
    tensors = {**pack(exported.init_state(2), PAST), "position": torch.tensor(0), "n_valid": torch.tensor(window - 2)}
    other = ids.clone()
    other[:, window - 2 :] = (other[:, window - 2 :] + 1) % bundle.model.config.vocab_size
    a, b = graph({**tensors, "input_ids": ids}), graph({**tensors, "input_ids": other})
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_states_are_not_changed(bundle):
    exported = ExportedModel(bundle.folder)
    ids = stream(bundle.model, 2, exported.config.window)
    state = exported.consolidate(ids, exported.init_state(2))
    before = {name: tensor.clone() for name, tensor in pack(state, PAST).items()}
    first = exported(ids, state).logits
    exported.consolidate(ids, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in pack(state, PAST).items())
    assert torch.equal(exported(ids, state).logits, first)


@pytest.mark.parametrize("case", OF_EVERY_KIND)
def test_as_pytorch_over_windows_with_sleeps(bundles, case):
    model, folder, parity = bundles(case)
    half = model.embed.weight.dtype == torch.float16
    assert all(0 <= d.mean <= d.maximum < (1e-2 if half else 1e-4) for d in parity.differences.values())
    assert any(d.maximum > 0 for d in parity.differences.values())
    assert half or parity.agreement == 1
    states = {name for stage, name in parity.differences if name != "logits"}
    assert states == set(pack(model(torch.zeros(1, 2, dtype=torch.int64)).state, PAST))
    assert {SLEEP, STRESS} <= {stage for stage, _ in parity.differences} or model.config.evict == "none"
    for file in json.loads((folder / "bundle.json").read_text())["graphs"]:
        onnx.checker.check_model(str(folder / file), full_check=True)


def moved_by_an_ulp(model):
    """Largest change of the fast weights, over four draws, when two thirds of the weights change by one unit in the last place.

    Random weights can make a sleeping model amplify rounding errors a thousandfold; no two implementations agree better.
    """

    def fast(model):
        state = model.init_state(2)
        for chunk in verify_stream(model, model.config.window).split(model.config.window, dim=1):
            state = model.consolidate(chunk, state)
            yield from (tensor for tensor in state.fast if tensor is not None)

    def moved(seed):
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        for weights in other.parameters():
            to = torch.tensor([-torch.inf, 0, torch.inf])[torch.randint(3, weights.shape, generator=generator)]
            weights.copy_(torch.where(to == 0, weights, weights.nextafter(to)))
        return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(fast(other), fast(model), strict=True))

    with torch.no_grad():
        return max(map(moved, range(4)))


@pytest.mark.extended
def test_a_model_that_amplifies_rounding_differs_by_its_conditioning(bundles):
    """Inserted blocks with weights five times larger exceed the 1e-4 of the test above, but only by as much as changing the
    weights by a few units in the last place changes the PyTorch model.
    """
    model, _, parity = bundles("ourojet-loud")
    assert max(d.maximum for d in parity.differences.values()) < 4 * moved_by_an_ulp(model)


@pytest.mark.parametrize("case", ["sliding", "full", "ort"])
def test_a_piece_is_its_tokens_one_by_one(bundles, case):
    model, folder, _ = bundles(case)
    exported = ExportedModel(folder)
    ids = stream(model, 2, 4)
    first = exported(ids[:, :1], exported.init_state(2)).state  # a piece may start inside a window
    T = exported.bundle.plan.prefill
    given = {"position": torch.tensor(1), "position_ids": torch.ones(2, T, dtype=torch.int64), **pack(first, PAST)}
    given |= exported._padded(ids[:, 1:4], T)  # three of its tokens are valid
    piece = exported._graphs["prefill.onnx"](given)
    logits, state = [], first
    for token in ids[:, 1:4].split(1, dim=1):
        step, state = exported(token, state)
        logits.append(step)
    assert torch.allclose(piece["logits"], logits[-1], atol=1e-5)
    assert torch.allclose(exported._head(piece)["logits"][:, :3], torch.cat(logits, dim=1), atol=1e-5)
    for name, tensor in pack(state, PRESENT).items():
        assert torch.allclose(piece[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("in_place", [False, True], ids=["rows", "in place"])
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        "mix",
        "ouro",
        "full",
        "ort",
        "ort-full",
        "half",
        *(pytest.param(case, marks=pytest.mark.extended) for case in ("swa", "ort-kda", "mla")),
    ],
)
def test_streams_of_a_batch_may_be_at_different_positions(bundles, case, in_place):
    """Each reads a token as PyTorch does alone; one has just begun, and a ring has turned where windows slide."""
    model, folder, _ = bundles(case)
    exported, ids = ExportedModel(folder), stream(model, 3, 9)
    starts = [0, 2, 7 if model.config.evict == "sliding" else 3]
    alone = [model(row[None, :start]).state if start else model.init_state() for row, start in zip(ids, starts, strict=True)]
    rows = exported.slots(3) if in_place else Rows(exported, 3)
    for n in (2, 0, 1):
        rows.put(n, exported.ringed(alone[n]))
    close = partial(torch.testing.assert_close, atol=2e-2 if model.embed.weight.dtype == torch.float16 else 1e-4, rtol=1e-3)
    for read in ([0, 1, 2], [2, 0], [1, 0], [1]):
        tokens = ids[read, 8:]
        logits = rows.read(read, tokens)
        for n, token, found in zip(read, tokens, logits, strict=True):
            wanted, alone[n] = model(token[None], alone[n])
            close(found, wanted[0])
    for n, state in enumerate(alone):
        taken = rows.take(n)
        assert taken.position == state.position
        for name, tensor in pack(exported.plain(taken), PAST).items():
            close(tensor, pack(state, PAST)[name])


@pytest.mark.parametrize("case", ["sliding", "hard", "full"])
def test_states_pass_from_one_to_the_other(bundles, case):
    """A stream can move from PyTorch to the graphs and back at any token."""
    model, folder, _ = bundles(case)
    exported = ExportedModel(folder)
    if model.config.evict != "none":
        ids = stream(model, 2, 2 * model.config.window)
        state = model.consolidate(ids[:, : model.config.window])
        ids = ids[:, model.config.window :]
    else:
        ids, state = stream(model, 2, 8), model.init_state(2)
    _, state = model(ids[:, :3], state)
    wanted, after = model(ids[:, 3:5], state)
    logits, ours = exported(ids[:, 3:5], exported.ringed(state))
    assert torch.allclose(logits, wanted, atol=1e-5)
    there, back = pack(after, PAST), pack(exported.plain(ours), PAST)
    assert there.keys() == back.keys()
    assert all(torch.allclose(back[name], tensor, atol=1e-5) for name, tensor in there.items())


@pytest.mark.parametrize("case", ["sliding", "hard"])
def test_a_session_moves_between_pytorch_and_the_graphs(bundles, case, tmp_path):
    model, folder, _ = bundles(case)
    ids = stream(model, 2, 4 * model.config.window)
    sessions = {"torch": zoo.Session(model, 2), "graphs": zoo.export.load(folder, batch_size=2)}
    fed = model.config.window + 3
    for name, session in sessions.items():
        session.feed(ids[:, :fed])
        session.save(tmp_path / name)
    wanted = sessions["torch"].feed(ids[:, fed:])
    assert torch.allclose(sessions["graphs"].load(tmp_path / "torch").feed(ids[:, fed:]), wanted, atol=1e-4)
    assert torch.allclose(sessions["torch"].load(tmp_path / "graphs").feed(ids[:, fed:]), wanted, atol=1e-4)
    with pytest.raises(ZooError, match="weights: the session is for"):
        zoo.Session(zoo.create(model.config, seed=1), 2).load(tmp_path / "graphs")


def test_any_number_of_passes_where_they_are_graphs(bundles):
    model, folder, _ = bundles("per-pass")
    exported = ExportedModel(folder)
    ids = stream(model, 2, 5)
    for loops in (1, 5):
        wanted = pack(model.consolidate(ids, loops=loops), PAST)
        slept = pack(exported.plain(exported.consolidate(ids, exported.init_state(2), loops=loops)), PAST)
        assert all(torch.allclose(slept[name], tensor, atol=1e-5) for name, tensor in wanted.items())
    exported = ExportedModel(bundles("hard").folder)
    with pytest.raises(ZooError, match="loops: 2; this bundle was exported with 3"):
        exported.consolidate(ids, exported.init_state(2), loops=2)


def test_none_is_bounded_by_its_length(bundles):
    exported = ExportedModel(bundles("full").folder)
    with pytest.raises(ZooError, match="7 tokens do not fit into a window of 6"):
        exported(torch.zeros(1, 7, dtype=torch.int64), exported.init_state())
    with pytest.raises(ZooError, match="never sleeps"):
        exported.consolidate(torch.zeros(1, 3, dtype=torch.int64), exported.init_state())


def test_other_weights_are_detected(bundles):
    model, folder, _ = bundles("hard")
    other = zoo.create(model.config, seed=1)
    with pytest.raises(ZooError, match=r"differs from PyTorch by .*, allowed: 1e-03"):
        verify(other, ExportedModel(folder))


def test_rounding_of_pytorch_is_not_held_against_the_graphs(bundles):
    model, folder, _ = bundles("hard")
    assert verify(model, ExportedModel(folder)).reference == "float32"
    ill_conditioned = copy.deepcopy(model)
    ill_conditioned.head.register_forward_hook(lambda module, inputs, h: h + 0.1 if h.dtype == torch.float32 else h)
    parity = verify(ill_conditioned, ExportedModel(folder))
    assert parity.reference == "float64"
    assert "PyTorch in float64" in str(parity.table().title)
    assert not parity.outside(1e-5)


def test_the_error_of_an_ill_conditioned_model_is_bounded_by_that_of_pytorch(bundles, monkeypatch):
    model, folder, _ = bundles("hard")
    monkeypatch.setitem(TOLERANCE, "float32", 0.0)
    assert verify(model, ExportedModel(folder)).reference == "float64"
    exported, plain = ExportedModel(folder), ExportedModel.plain
    off = partial(tree_map, lambda x: x * 1.0001 if torch.is_tensor(x) else x)
    monkeypatch.setattr(ExportedModel, "plain", lambda self, state: off(plain(self, state)))
    with pytest.raises(ZooError, match=r"_state.*: the graph differs from PyTorch by .*e-05, allowed: \de-06"):
        verify(model, exported)


@pytest.mark.parametrize("ids", [(2, 7), (3, 1), (2, 0), (2,)])
def test_tokens_that_do_not_fit(bundles, ids):
    exported = ExportedModel(bundles("hard").folder)
    for run in (exported, exported.consolidate):
        with pytest.raises(ZooError, match="ids"):
            run(torch.zeros(ids, dtype=torch.int64), exported.init_state(2))


def test_a_sleep_starts_where_its_window_does(bundles):
    exported = ExportedModel(bundles("hard").folder)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ZooError, match="at position 2"):
        exported.consolidate(ids, exported(ids, exported.init_state()).state)


@pytest.mark.parametrize("start", [10**6, 10**7])
def test_logits_far_from_the_start(bundles, start):
    """Under sliding eviction positions continue; rotary angles depend only on distances, at any position.

    Far from the start the graphs take the empty cache for a full one, which has no influence left after six windows.
    """
    exported = ExportedModel(bundles("attn").folder)
    window = exported.config.window
    ids = stream(bundles("attn").model, 1, 8 * window)

    def logits(position):
        state, found = exported.init_state(1)._replace(position=position), []
        for chunk in ids.split(window, dim=1):
            found.append(exported(chunk, state).logits)
            state = exported.consolidate(chunk, state)
        assert state.position == position + ids.shape[1]
        return torch.cat(found[6:], dim=1)

    torch.testing.assert_close(logits(start), logits(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("where", ["logits", "states"])
def test_nan_is_a_difference(bundles, where):
    """Also where it comes last, in the padded short window: Python's max keeps what it has seen before."""
    model, folder, _ = bundles("hard")

    class Broken(ExportedModel):
        def __call__(self, ids, state, **options):
            out = super().__call__(ids, state, **options)
            short = 1 < ids.shape[1] < self.bundle.window
            return out._replace(logits=out.logits * float("nan")) if short and where == "logits" else out

        def consolidate(self, ids, state, **options):
            after = super().consolidate(ids, state, **options)
            if ids.shape[1] == self.bundle.window or where == "logits":
                return after
            return tree_map(lambda x: x * float("nan") if torch.is_tensor(x) else x, after)

    with pytest.raises(ZooError, match=r"the graph differs from PyTorch by nan"):
        verify(model, Broken(folder))

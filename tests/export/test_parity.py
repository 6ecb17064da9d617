"""A session on the graphs answers as the PyTorch session does."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.export.ring import PAST, pack
from zoo.export.runtime import ExportedModel
from zoo.export.verify import SLEEP, TOLERANCE, verify
from zoo.kernels.registry import ZooError


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


def test_what_padding_holds_does_not_matter(bundle):
    exported = ExportedModel(bundle.folder)
    graph = exported._consolidation
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


def test_the_report_covers_every_tensor(bundle):
    differences, window = bundle.parity.differences, bundle.model.config.window
    assert {kind for _, kind in differences} == {"logits", "recurrent_state", "conv_state", "key", "value"}
    assert (SLEEP, "recurrent_state") in differences
    assert all(0 <= d.mean <= d.maximum < TOLERANCE / 10 for d in differences.values())
    assert any(d.maximum > 0 for d in differences.values())
    assert bundle.parity.agreement == 1
    assert bundle.parity.tokens == 2 * (4 * window - window // 2)
    assert bundle.parity.table().row_count == len(differences)


def test_other_weights_are_found_out(bundles):
    model, folder, _ = bundles("hard")
    other = zoo.create(model.config, seed=1)
    with pytest.raises(ZooError, match="from PyTorch, allowed: 1e-03"):
        verify(other, ExportedModel(folder))


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

"""Packed training: every document is a stream of its own, whichever documents share its batch."""

import pytest
import torch
from torch.nn.functional import pad

import zoo
from zoo.costs import training_flops
from zoo.loss import chunks, predicted

L = 8
LENGTHS = [13, 3, 30, 8, 2, 17]
CU = torch.tensor([0, *LENGTHS]).cumsum(0)


def documents(kind):
    """Ids and loss masks: an answer at the end, or turns all over, so that loss lies in different chunks."""
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(32, (n,), generator=random) for n in LENGTHS]
    masks = [torch.arange(n) >= n - 2 for n in LENGTHS]
    if kind == "turns":
        masks = [torch.rand(n, generator=random) < 0.4 for n in LENGTHS]
    for mask in masks:
        mask[0], mask[-1] = False, True
    return ids, masks


def new_model(evict, loops, sleep_on):
    fields = {"layers": "attn gdn mamba2", "d_model": 16, "d_ff": 16, "vocab_size": 32, "blocks": {"mamba2": {"head_dim": 16}}}
    fields |= {"sleep_on": sleep_on, "span": [1, 2]}
    return zoo.create("gdn4", **fields, loops=loops, evict=evict, window=L, dtype="float64", seed=2)


def one_by_one(model, ids, masks):
    """Mean loss of documents that are run alone, with its gradients. One whose only answer has no prediction carries no loss."""
    losses = [model.answers(i[None], m[None]).losses() for i, m in zip(ids, masks, strict=True) if has_prediction(model, m[None])]
    return torch.cat(losses).mean()


def has_prediction(model, mask):
    return bool(predicted(mask, chunks(mask, model.config)).any())


@pytest.mark.parametrize("evict", ["hard", "sliding"])
@pytest.mark.parametrize(
    ("kind", "sleep_on", "loops"), [("answers", "unsupervised", 3), ("turns", "every", 2), ("turns", "unsupervised", 1)]
)
def test_packed_equals_the_documents_one_by_one(evict, kind, sleep_on, loops):
    """Loss and gradients, packed and as padded rows."""
    model, (ids, masks) = new_model(evict, loops, sleep_on), documents(kind)
    expected = one_by_one(model, ids, masks)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    rows = [torch.stack([pad(x, (0, max(LENGTHS) - len(x))) for x in xs]) for xs in (ids, masks)]
    for inputs, more in (((torch.cat(ids)[None], torch.cat(masks)[None]), {"cu_seqlens": CU}), (rows, {})):
        loss = model.loss(*inputs, **more)
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
        for found, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_no_token_sees_another_document():
    model, (ids, masks) = new_model("sliding", 2, "every"), documents("turns")
    with torch.no_grad():
        before = model.answers(torch.cat(ids)[None], torch.cat(masks)[None], cu_seqlens=CU)
        ids[2] = (ids[2] + 1) % 32
        after = model.answers(torch.cat(ids)[None], torch.cat(masks)[None], cu_seqlens=CU)
    assert torch.equal(before.place, after.place)
    other = (before.place < CU[2]) | (before.place >= CU[3])
    torch.testing.assert_close(before.losses()[other], after.losses()[other], atol=1e-12, rtol=0)
    assert ((before.losses() - after.losses()).abs()[~other] > 1e-6).any()
    assert torch.equal(after.target, torch.cat(ids)[after.place])


def test_recomputation_changes_nothing():
    model, (ids, masks) = new_model("hard", 2, "every"), documents("turns")
    inputs = {"ids": torch.cat(ids)[None], "loss_mask": torch.cat(masks)[None], "cu_seqlens": CU}
    found = []
    for recompute in ("nothing", "passes", "chunks"):
        loss = model.answers(**inputs, recompute=recompute).losses().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_documents_that_have_ended_cost_nothing():
    """The windows of a long document are run for it alone."""
    model = new_model("hard", 2, "unsupervised")
    mask = torch.zeros(5, 40, dtype=torch.bool)
    mask[:4, 7], mask[4, 39] = True, True
    alone = training_flops(model, mask[4:]) + training_flops(model, mask[:4, :8])
    assert training_flops(model, mask) == alone


def test_what_does_not_fit_is_refused():
    model, (ids, masks) = new_model("hard", 1, "every"), documents("turns")
    packed = torch.cat(ids)[None], torch.cat(masks)[None]
    with pytest.raises(zoo.ZooError, match="want strictly increasing from 0 to 73"):
        model.loss(*packed, cu_seqlens=CU[:-1])
    with pytest.raises(zoo.ZooError, match="must be in one row"):
        model.loss(*(x.expand(2, -1) for x in packed), cu_seqlens=CU)
    with pytest.raises(zoo.ZooError, match="backward_chunks: 2 needs sequences with loss in the same chunks"):
        model.answers(*packed, cu_seqlens=CU, backward_chunks=2)

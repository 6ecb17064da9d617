"""What torch is set to around the library (default device and dtype, precision of products, dispatch modes) changes no value."""

from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo
from zoo.export.bundle import export
from zoo.products import set_precision

IDS = torch.arange(14).view(2, 7) % 11
LAYERS = {"attention": "attn swa gdn", "latent attention": "mla mamba", "experts": "gdn swa"}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "another default device": lambda: torch.device("meta"),
    "a wider default dtype": lambda: default_dtype(torch.float64),
    "a narrower default dtype": lambda: default_dtype(torch.bfloat16),
}


@pytest.fixture(params=["highest", "medium"])
def precision(request):
    with set_precision(request.param):
        yield


def make(kind):
    blocks = {"attn": {"heads": 2}, "swa": {"heads": 2, "window": 3}, "gdn": {"heads": 2, "expand_v": 1}, "mla": {"heads": 2}}
    blocks = {name: blocks[name] for name in LAYERS[kind].split() if name in blocks}
    fields = {"layers": LAYERS[kind], "d_model": 24, "d_ff": 12, "vocab_size": 11, "blocks": blocks}
    return zoo.create("gdn4-sleep2-hard5", mlp="moe" if kind == "experts" else "swiglu", **fields)


def results(model):
    """What a model computes, learns and says."""
    model.zero_grad()
    loss = model.loss(IDS, IDS > 4)
    loss.backward()
    yield loss.detach()
    yield from (p.grad for p in model.parameters() if p.grad is not None)
    session = zoo.Session(model, 2)
    yield session.feed(IDS)
    yield from session.generate(None, 6)
    with zoo.SessionPool(model, 1, streams=2) as pool:
        for row in IDS:
            stream = pool.open()
            yield from stream.generate(row[None], 3, temperature=1.0, seed=3)
            stream.close()
    with TemporaryDirectory() as folder:
        session.save(f"{folder}/session")
        zoo.save(model, f"{folder}/model")
        yield zoo.Session(zoo.load(f"{folder}/model"), 2).load(f"{folder}/session").feed(IDS)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_values_are_the_same(precision, kind, around):
    """Initial weights, and what they compute."""
    model = make(kind)
    want = list(results(model))
    with SURROUNDINGS[around]():
        made = make(kind)
        got = list(results(model))
    again = list(results(model))
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    for values in (got, again):
        for x, y in zip(values, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("around", [lambda: torch.device("meta"), lambda: FakeTensorMode(allow_non_fake_inputs=True), nullcontext])
def test_the_first_call_leaves_nothing_behind(precision, around):
    """Tables that are made once and kept belong to no device or mode of their first caller."""
    model = zoo.create("gdn4-sleep2-hard32", layers="attn gdn", d_model=24, d_ff=12, vocab_size=11, blocks={"gdn": {"heads": 3}})
    zoo.arrange_weights(model)
    with torch.no_grad():
        state = model(IDS).state
        with around():
            model(IDS[:, :1], state)
        kept = model(IDS[:, :1], state).logits
        assert type(kept) is torch.Tensor
        wide = model.double()
        state = wide(IDS).state
        torch.testing.assert_close(kept.double(), wide(IDS[:, :1], state).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_bundles(around, tmp_path):
    """Written, opened and used alone and in a pool."""

    def tokens(folder):
        model = zoo.create("gdn4-sleep2-hard5", layers="attn gdn", d_model=24, d_ff=12, vocab_size=11, blocks={"gdn": {"heads": 3}})
        export(model, folder, verified=False)
        session = zoo.export.load(folder, batch_size=2)
        with zoo.SessionPool(session.model, slots=2) as pool:
            streams = [pool.open() for _ in IDS]
            return *session.generate(IDS, 8), *(
                token for stream, row in zip(streams, IDS, strict=True) for token in stream.generate(row[None], 8)
            )

    want = tokens(tmp_path / "plain")
    with SURROUNDINGS[around]():
        got = tokens(tmp_path / "surrounded")
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)

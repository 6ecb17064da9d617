"""Sleeps under random mixes of mixers, span, policy, loops and chunk lengths."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zoo
from zoo.blocks.attention import KV
from zoo.blocks.mixer import parts
from zoo.blocks.positions import Positions

BLOCKS: dict[str, dict[str, Any]] = {
    "attn": {"heads": 2, "kv_heads": 1},
    "swa": {"heads": 2, "window": 3},
    "gdn": {"heads": 2},
    "kda": {"heads": 2},
    "mla": {"heads": 2, "rank": 3, "shared_dim": 1},
    "jet": {"heads": 2, "mlp": False},
    "mamba": {"state_dim": 3},
    "mamba2": {"head_dim": 8, "state_dim": 4, "mlp": False},
    "conv": {},
    "rglru": {"heads": 2},
    "parallel": {"attn": {"heads": 2}, "mamba2": {"head_dim": 4, "state_dim": 3}, "attn_out_scale": 0.5},
}
RECURRENT = {"gdn", "kda", "jet", "mamba", "mamba2", "rglru", "parallel"}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    kinds = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5))
    policy = draw(st.sampled_from(["none", "hard", "sliding"] if RECURRENT & set(kinds) else ["none", "sliding"]))
    first = draw(st.integers(0, len(kinds) - 1))
    last = draw(st.integers(first, len(kinds) - 1))
    return {
        "name": "fuzz",
        "vocab_size": 13,
        "d_model": 8,
        "d_ff": 16,
        "layers": " ".join(kinds),
        "blocks": BLOCKS,
        "evict": policy,
        "window": draw(st.integers(1, 7)) if policy != "none" else None,
        "span": (first, last),
        "loops": draw(st.integers(1, 3)),
        "loop_norm": draw(st.booleans()),
        "inject": draw(st.booleans()),
        "norm": draw(st.sampled_from(["plain", "wide", "centred"])),
    }


def assert_same(got: zoo.State, want: zoo.State) -> None:
    assert got.position == want.position
    torch.testing.assert_close((got.fast, got.window), (want.fast, want.window), rtol=1e-8, atol=1e-8)


def equal(a: zoo.State, b: zoo.State) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def in_chunks(model: zoo.Model, ids: torch.Tensor, loops: int, pieces: int) -> tuple[torch.Tensor, zoo.State]:
    """Read pieces of these lengths; at the end of each window, sleep from its start."""
    logits, state = [], model.init_state(len(ids))
    for chunk in ids.split(model.config.window or ids.shape[1], dim=1):
        awake = state
        for piece in chunk.split(pieces, dim=1):
            out = model(piece, awake)
            logits.append(out.logits)
            awake = out.state
        state = model.consolidate(chunk, state, loops=loops)
        if loops == 1:
            assert_same(state, model.evict(awake))
    return torch.cat(logits, dim=1), state


def sleep_by_the_book(model: zoo.Model, ids: torch.Tensor, start: zoo.State, loops: int) -> zoo.State:
    """Run the equations of a sleep line by line, one block at a time."""
    steps = Positions(start.position, ids.shape[1], ids.device)
    fast, window, h = list(start.fast), list(start.window), model.embed(ids)
    first, last = model.config.span

    def through(layers: range, h: torch.Tensor) -> torch.Tensor:
        for i in layers:
            h, fast[i], window[i] = model.blocks[i](h, fast[i], start.window[i], steps)  # from the chunk's start, in every pass
        return h

    h = entered = through(range(first), h)
    for n in range(loops):
        if n and model.config.loop_norm:
            h = model.norm(h)
        if n and model.config.inject:
            h = h + model.inject * entered
        h = through(range(first, last + 1), h)
    through(range(last + 1, len(model.blocks)), h)
    return model.evict(zoo.State(tuple(fast), tuple(window), start.position + ids.shape[1]))


DRAWN = given(configs(), st.integers(1, 12), st.integers(1, 5), st.integers(0, 100))
HOW: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=50, **HOW)
@DRAWN
def test_contract(config: dict[str, Any], length: int, pieces: int, seed: int) -> None:
    check(config, length, pieces, seed)


@pytest.mark.extended
@settings(max_examples=500, **HOW)
@DRAWN
def test_contract_in_more_cases(config: dict[str, Any], length: int, pieces: int, seed: int) -> None:
    check(config, length, pieces, seed)


@torch.no_grad()
def check(config: dict[str, Any], length: int, pieces: int, seed: int) -> None:
    model = zoo.create(config, dtype=torch.float64, seed=seed)
    if config["inject"]:
        model.inject.fill_(0.5)
    loops, window = config["loops"], config["window"]
    ids = torch.randint(0, 13, (2, length), generator=torch.Generator().manual_seed(seed))

    # cutting a window into pieces changes nothing; one loop is the ordinary hybrid, bit for bit
    whole, asleep = in_chunks(model, ids, loops, pieces=length)
    again, asleep_again = in_chunks(model, ids, loops, pieces)
    torch.testing.assert_close(again, whole, rtol=1e-8, atol=1e-8)
    assert_same(asleep_again, asleep)
    in_chunks(model, ids, 1, pieces)
    chunk = ids[:, :window]
    start = model.init_state(2)
    assert equal(model.consolidate(chunk, start, loops=1), model.evict(model(chunk, start).state))
    assert equal(start, model.init_state(2))  # nothing is changed in place

    middle = model.consolidate(chunk, start)
    assert_same(model.consolidate(chunk, middle), sleep_by_the_book(model, chunk, middle, loops))

    # a row sleeps as it would alone
    assert_same(in_chunks(model, ids[:1], loops, length)[1], zoo.State(*rows(asleep)))

    # what each policy keeps
    for kind, cache in zip(model.config.pattern, asleep.window, strict=True):
        for part in parts(cache):
            if isinstance(part, KV):
                bound = {"none": length, "hard": 0, "sliding": (window or 0) - 1}[config["evict"]]
                assert part.key.shape[2] <= min(bound, 2 if kind == "swa" else bound)
            elif config["evict"] == "hard":
                assert not part.conv_state.any()
    assert asleep.position == (0 if config["evict"] == "hard" else length)

    # loops change the fast weights of the span, never those of the prelude
    once, many = model.consolidate(chunk, loops=1), model.consolidate(chunk, loops=3)
    for layer, (a, b) in enumerate(zip(once.fast, many.fast, strict=True)):
        if a is not None and layer < config["span"][0]:
            assert torch.equal(a, b)
        elif a is not None and layer <= config["span"][1]:
            assert not torch.equal(a, b)


def rows(state: zoo.State) -> tuple[Any, ...]:
    first = torch.utils._pytree.tree_map(lambda x: x[:1] if isinstance(x, torch.Tensor) else x, tuple(state))
    return tuple(first)

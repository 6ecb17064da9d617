"""Caches that grow in place: their values are those of concatenation, whoever continues from which cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from zoo.blocks.growing import SPARE, append, newest

SHAPE = 2, 3, 5  # streams, heads, width


def tokens(n: int, seed: int = 0) -> Tensor:
    B, H, D = SHAPE
    return torch.randn(B, H, n, D, generator=torch.Generator().manual_seed(seed))


def bytes_of(cache: Tensor) -> int:
    return cache.untyped_storage().nbytes()


@torch.no_grad()
def test_a_cache_grows_without_being_copied() -> None:
    whole = tokens(SPARE + 2)
    cache = append(whole[:, :, :1], whole[:, :, 1:2])
    first = cache.data_ptr()
    for t in range(2, SPARE + 2):
        before, cache = cache, append(cache, whole[:, :, t : t + 1])
        assert torch.equal(before, whole[:, :, :t])
    assert torch.equal(cache, whole)
    assert cache.data_ptr() == first


@torch.no_grad()
def test_memory_is_a_quarter_more_than_the_tokens() -> None:
    cache = tokens(1)
    for t in range(2000):
        cache = append(cache, tokens(1, t))
        assert bytes_of(cache) <= bytes_of(tokens(1)) * (cache.shape[2] * 5 / 4 + SPARE)


@torch.no_grad()
def test_two_caches_that_continue_from_one_are_independent() -> None:
    root = append(tokens(3), tokens(2, 1))
    for _ in range(2):  # the second time, there is no room left after the root
        left, right = append(root, tokens(1, 2)), append(root, tokens(4, 3))
        left, right = append(left, tokens(1, 4)), append(right, tokens(1, 5))
        assert torch.equal(root, torch.cat([tokens(3), tokens(2, 1)], dim=2))
        assert torch.equal(left, torch.cat([root, tokens(1, 2), tokens(1, 4)], dim=2))
        assert torch.equal(right, torch.cat([root, tokens(4, 3), tokens(1, 5)], dim=2))


@torch.no_grad()
def test_threads_that_continue_from_one_cache_are_independent() -> None:
    with ThreadPoolExecutor(8) as threads:
        for _ in range(50):
            root = append(tokens(3), tokens(2, 1))
            caches = list(threads.map(torch.no_grad()(append), [root] * 8, map(partial(tokens, 1), range(8))))
            assert all(torch.equal(cache[:, :, -1:], tokens(1, seed)) for seed, cache in enumerate(caches))


@torch.no_grad()
@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 2)])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_parts_of_a_cache_are_copied(dim: int, part: slice) -> None:
    root = append(tokens(3), tokens(2, 1))
    where = tuple(part if d == dim else slice(None) for d in range(4))
    assert torch.equal(append(root[where], tokens(1, 2)[where]), torch.cat([root, tokens(1, 2)], dim=2)[where])
    assert torch.equal(append(root, tokens(1, 3)), torch.cat([root, tokens(1, 3)], dim=2))


@torch.no_grad()
def test_earlier_tokens_of_a_cache_can_be_continued() -> None:
    root = append(tokens(3), tokens(6, 1))
    assert torch.equal(append(root[:, :, :4], tokens(2, 2)), torch.cat([root[:, :, :4], tokens(2, 2)], dim=2))
    assert torch.equal(append(root[:, :, 2:], tokens(2, 3)), torch.cat([root[:, :, 2:], tokens(2, 3)], dim=2))
    assert torch.equal(root, torch.cat([tokens(3), tokens(6, 1)], dim=2))


@torch.no_grad()
def test_a_sliding_window_stays_small() -> None:
    whole, cache = tokens(1000), tokens(0)
    for t in range(1000):
        cache = newest(append(cache, whole[:, :, t : t + 1]), min(t + 1, 16))
        assert torch.equal(cache, whole[:, :, max(0, t - 15) : t + 1])
        assert bytes_of(cache) <= bytes_of(tokens(1)) * 2 * (16 + SPARE)


@torch.no_grad()
def test_few_of_many_tokens_let_go_of_the_others() -> None:
    cache = append(tokens(1000), tokens(1))
    for kept in (0, 3, 300):
        assert bytes_of(newest(cache, kept)) == bytes_of(tokens(1)) * kept
        assert torch.equal(newest(cache, kept), cache[:, :, 1001 - kept :])


def test_a_cache_is_continued_in_inference_mode_and_outside() -> None:
    with torch.inference_mode():
        root = append(tokens(3), tokens(2, 1))
    with torch.no_grad():
        cache = append(root, tokens(1, 2))
    with torch.inference_mode():
        cache = append(cache, tokens(1, 3))
    assert torch.equal(cache, torch.cat([tokens(3), tokens(2, 1), tokens(1, 2), tokens(1, 3)], dim=2))


def test_gradients_reach_every_cache() -> None:
    with torch.no_grad():
        root = append(tokens(3), tokens(2, 1))
    new = [tokens(1, seed).requires_grad_() for seed in (2, 3)]
    first = append(root, new[0])
    second = append(first, new[1])
    (first.square().sum() + second.square().sum()).backward()
    assert all(x.grad is not None for x in new)
    torch.testing.assert_close(new[0].grad, 4 * new[0].detach())
    torch.testing.assert_close(new[1].grad, 2 * new[1].detach())

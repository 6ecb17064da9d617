"""Eviction policies: what happens to the window cache at the end of a chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from zoo.registry import Registry

if TYPE_CHECKING:
    from zoo.blocks.mixer import WindowCache


evictions: Registry[type[Eviction]] = Registry("eviction policy", "evictions")


@evictions.register("none")
class Eviction:
    """Keep everything (`none`). The base class of every policy.

    Args:
        window: L, the number of tokens in a window; None where the policy has no window.
    """

    uses_window: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    """True if an eviction empties the window cache, after which positions start at 0 again."""

    def __init__(self, window: int | None) -> None:
        self.window = window

    @property
    def reach(self) -> int | None:
        """Number of tokens that a token may attend to, itself included; None: all cached tokens."""
        return None

    def evict(self, cache: WindowCache) -> WindowCache:
        """Return a mixer's window cache after the eviction."""
        return cache

    def kept(self, tokens: int) -> int:
        """Number of tokens that `evict` keeps of a cache of `tokens` tokens."""
        return tokens


@evictions.register("hard")
class Hard(Eviction):
    """Empty the window cache: only the fast weights cross from one window to the next."""

    uses_window = True
    restarts = True

    def evict(self, cache: WindowCache) -> WindowCache:
        return cache.empty()

    def kept(self, tokens: int) -> int:
        return 0


@evictions.register("sliding")
class Sliding(Eviction):
    """Keep the newest L - 1 tokens, so that every token attends to itself and the L - 1 before it."""

    uses_window = True

    @property
    def reach(self) -> int | None:
        return self.window

    def evict(self, cache: WindowCache) -> WindowCache:
        assert self.window is not None
        return cache.keep(self.window - 1)

    def kept(self, tokens: int) -> int:
        assert self.window is not None
        return min(tokens, self.window - 1)

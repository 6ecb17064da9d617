"""The registry that every floor builds on: catalogue, with duplicates refused and the nearest name offered."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

import catalogue

from zoo.errors import ZooError

T = TypeVar("T")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """What to tell someone who wrote `word` where only `allowed` words fit."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}allowed: {', '.join(allowed) or 'nothing'}"


class Registry(Generic[T]):
    """Names to objects of one kind, from this package and from any installed package.

    Args:
        kind: the word for errors ("block", "task", ...).
        group: catalogue namespace; another package adds an object through the entry point group `zoo_<group>`.
        populate: registers what this package brings itself; called once, before the first look-up.
    """

    def __init__(self, kind: str, group: str, populate: Callable[[], None] | None = None) -> None:
        self.kind = kind
        self.group = f"zoo_{group}"
        self._own = catalogue.create("zoo", group)
        self._populate = populate
        self._others: dict[str, EntryPoint] | None = None
        self._found: dict[str, T] = {}  # catalogue takes microseconds, and a token asks for a kernel dozens of times

    def register(self, name: str, item: T | None = None) -> Any:
        """Add `item` under `name`; without `item`, a decorator. A name that is taken is an error."""
        if item is None:
            return lambda decorated: self.register(name, decorated)
        if name in self._own and not _same_source(self._own.get(name), item):
            raise ZooError(f"{self.kind} '{name}' is registered twice")
        self._own.register(name, func=item)
        self._found.pop(name, None)
        return item

    def names(self) -> list[str]:
        """Every name, sorted; imports no other package."""
        others = self._look_around()
        return sorted({*self._own.get_all(), *others})

    def __contains__(self, name: str) -> bool:
        return name in self._look_around() or name in self._own

    def get(self, name: str) -> T:
        """The object called `name`. Raises ZooError with the nearest names."""
        if name not in self._found:
            others = self._look_around()
            if name in self._own:
                self._found[name] = self._own.get(name)
            elif name in others:
                self._found[name] = others[name].load()
            else:
                raise ZooError(f"unknown {self.kind} '{name}'; {nearest(name, self.names())}")
        return self._found[name]

    def _look_around(self) -> dict[str, EntryPoint]:
        """Once, before the first look-up: register what is ours and find what other packages offer."""
        if self._others is None:
            if self._populate is not None:
                self._populate()
            others = {point.name: point for point in entry_points(group=self.group)}
            for name, point in others.items():
                if name in self._own:
                    raise ZooError(f"{self.kind} '{name}' is registered twice: here and by {point.value}")
            self._others = others
        return self._others


def _same_source(a: Any, b: Any) -> bool:
    """True when a module was only imported again (importlib.reload, notebooks)."""
    return (getattr(a, "__module__", a), getattr(a, "__qualname__", a)) == (
        getattr(b, "__module__", b),
        getattr(b, "__qualname__", b),
    )

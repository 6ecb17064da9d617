"""The registry that every layer builds on: `catalogue` plus entry points, rejection of duplicates, and name suggestions."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import catalogue

from zoo.errors import ZooError

T = TypeVar("T")
Decorated = TypeVar("Decorated")


LISTED, FEW = 16, 5
"""Maximum number of words that an error lists; of more, it lists a few."""
CLOSE = 0.65
"""Minimum similarity at which a word may be a misspelling or a part of another."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return the end of an error about an unknown `word`: the allowed word that is close to it, if one is, and then all of them, or
    the closest few if there are many."""
    allowed = sorted(allowed)
    closest = sorted(allowed, key=lambda other: _closeness(word, other), reverse=True)
    hint = f"did you mean '{closest[0]}'? " if closest and _closeness(word, closest[0]) >= CLOSE else ""
    return f"{hint}allowed: {listed(allowed if len(allowed) <= LISTED else closest)}"


def listed(words: Sequence[str]) -> str:
    """Return the words, or the first few of many, for an error."""
    if len(words) > LISTED:
        return f"{', '.join(words[:FEW])} and {len(words) - FEW} others"
    return ", ".join(words) or "nothing"


def _closeness(word: str, other: str) -> float:
    """Return the similarity of two words: half of it if they begin differently or one is long, more than 1 if one contains the other."""
    short, long = sorted((word.casefold(), other.casefold()), key=len)
    similarity = difflib.SequenceMatcher(None, long, short).ratio()
    if len(short) > 2 and short in long:
        return 1 + similarity
    alike = short[:1] == long[:1] and 2 * len(short) > len(long)
    return similarity if alike else similarity / 2


class Origin(NamedTuple):
    """Origin of a registered object."""

    home: str
    """Full name of a class or function; of any other object, the module that registered it."""
    source: str
    """Description of the object in error messages."""
    spec: object = None
    """Spec of the module that registered it. importlib.reload makes a new one; in a notebook it is None."""

    def repeats(self, before: Origin) -> bool:
        """Return True if this is the same object as `before`, registered again because its module or notebook cell has been re-run."""
        return self.home == before.home and (":" in self.home or self.spec is None or self.spec is not before.spec)


class Registry(Generic[T]):
    """Objects of one kind by name, from this package and from any other installed package.

    An object is added by `register`, called in a module, or by an entry point of the group `zoo_<group>`; both may name the
    same object. A name that stands for two different objects is an error.

    Args:
        kind: the word for such an object in errors ("block", "task", ...).
        group: catalogue namespace, and the end of the name of the entry point group.
        modules: modules of this package that register objects, imported before the first lookup: "zoo.blocks.*", or
            "zoo.kernels.*.op" for one module in each folder. None if they are registered where the registry is created.
    """

    def __init__(self, kind: str, group: str, modules: str | None = None) -> None:
        self.kind = kind
        self.group = f"zoo_{group}"
        self._modules = modules
        self._registered = catalogue.create("zoo", group)
        self._origins: dict[str, Origin] = {}
        self._points: dict[str, list[EntryPoint]] | None = None
        self._found: dict[str, T] = {}  # catalogue takes microseconds, and a token asks for a kernel dozens of times

    @overload
    def register(self, name: str, item: T) -> T: ...
    @overload
    def register(self, name: str) -> Callable[[Decorated], Decorated]: ...
    def register(self, name: str, item: Any = None) -> Any:
        """Add `item` under `name`; without `item`, return a decorator.

        Raises:
            ZooError: another object has this name. The same one may be registered again, also after importlib.reload.
        """
        caller = sys._getframe(1).f_globals

        def add(item: Any) -> Any:
            home = _home(item, caller["__name__"])
            origin = Origin(home, home, caller.get("__spec__"))
            if name in self._registered:
                self._check_same(name, item, origin)
            self._registered.register(name, func=item)
            self._origins[name] = origin
            self._found.pop(name, None)
            return item

        return add if item is None else add(item)

    def names(self) -> list[str]:
        """Return every name, sorted, without importing other packages."""
        return sorted({*self._entry_points(), *self._registered.get_all()})

    def __contains__(self, name: str) -> bool:
        return name in self._entry_points() or name in self._registered

    def get(self, name: str, field: str = "") -> T:
        """Return the object called `name`.

        Args:
            field: the field of a config that names it, for the message.
        Raises:
            ZooError: there is none (the message offers the nearest name), two packages offer different ones, or the package
                that offers it cannot be imported.
        """
        if name not in self._found:
            for point in self._entry_points().get(name, ()):
                self._load(name, point)
            if name not in self._registered:
                raise ZooError(f"{field and field + ': '}unknown {self.kind} '{name}'; {nearest(name, self.names())}")
            self._found[name] = self._registered.get(name)
        return self._found[name]

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        """Entry points of the group by name, unloaded. The first call imports this package's own modules."""
        if self._points is None:
            for module in _matching(self._modules) if self._modules else ():
                importlib.import_module(module)
            points: dict[str, list[EntryPoint]] = {}
            for point in entry_points(group=self.group):
                points.setdefault(point.name, []).append(point)
            self._points = points
        return self._points

    def _load(self, name: str, point: EntryPoint) -> None:
        """Register the object that an entry point names, unless its module has done so."""
        source = point.value + (f" of {point.dist.name} {point.dist.version}" if point.dist else "")
        try:
            item = point.load()
        except Exception as error:  # a module may raise anything while it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ZooError(f"{self.kind} '{name}': cannot import {source}: {reason}") from error
        origin = Origin(_home(item, point.value), source)
        if name in self._registered:
            self._check_same(name, item, origin)
        else:
            self._registered.register(name, func=item)
            self._origins[name] = origin

    def _check_same(self, name: str, item: Any, origin: Origin) -> None:
        known = self._origins.get(name)  # None after a reload of the module that holds this registry
        if known and item is not self._registered.get(name) and not origin.repeats(known):
            raise ZooError(f"{self.kind} '{name}' is registered twice: by {known.source} and by {origin.source}")


def _home(item: Any, where: str) -> str:
    name = getattr(item, "__qualname__", None)
    return where if name is None else f"{where if '<' in name else item.__module__}:{name}"


def _matching(pattern: str) -> list[str]:
    """Names of the modules that a pattern with one `*` matches, sorted."""
    package, _, rest = pattern.partition(".*")
    folders = map(Path, importlib.import_module(package).__path__)
    files = {file.relative_to(folder).with_suffix("") for folder in folders for file in folder.glob(f"*{rest.replace('.', '/')}.py")}
    return [".".join((package, *file.parts)) for file in sorted(files) if file.name != "__init__"]

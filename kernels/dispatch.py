"""Which form of an operator runs: the fastest that fits, or the one a user forces."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from zoo.kernels.registry import Registry, ZooError, nearest

OPERATORS = ("causal_conv1d", "dynamic_conv1d", "gated_delta_rule", "selective_scan", "ssd")


def _import_operators() -> None:
    for operator in OPERATORS:
        importlib.import_module(f"zoo.kernels.{operator}.op")


kernels: Registry[Callable[..., Any]] = Registry("kernel", "kernels", _import_operators)  # "<operator>.<form>"

_forced: str | None = None


class use:
    """Run every operator in one form ("reference", "chunked"), from now on or within a `with` block; None undoes it.

    Raises:
        ZooError: no operator has such a form.
    """

    def __init__(self, form: str | None) -> None:
        global _forced
        forms = {name.split(".")[1] for name in kernels.names()}
        if form is not None and form not in forms:
            raise ZooError(f"unknown kernel form '{form}'; {nearest(form, forms)}")
        self._before, _forced = _forced, form

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._before


def choose(operator: str, default: str) -> Callable[..., Any]:
    """The form that serves this call of `operator`: the forced one if the operator has it, else `default`."""
    forced = f"{operator}.{_forced}"
    return kernels.get(forced if _forced and forced in kernels.names() else f"{operator}.{default}")

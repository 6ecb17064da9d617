"""Dispatch: Triton where it can run, elsewhere the fastest PyTorch form, or the form a user forces."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels.common.recording import untraced
from zoo.registry import Registry, nearest

ENVIRONMENT = "ZOO_KERNELS"

log = logging.getLogger("zoo.kernels")

operators: Registry[Callable[..., Any]] = Registry("operator", "operators", "zoo.kernels.*.op")
"""Public functions. Each is defined in a module `op`, which also registers its forms; a module `example` is next to it."""

kernels: Registry[Callable[..., Any]] = Registry("kernel", "kernels", "zoo.kernels.*.op")
"""Forms of operators, "<operator>.<form>"."""

_forced: str | None = None
_here = threading.local()
_logged: set[tuple[str, str]] = set()


class use:
    """Force one form for every operator ("reference", "chunked", "triton"), permanently or within a `with` block. None resets it.

    The environment variable ZOO_KERNELS sets the form for a whole process; the argument `form` of an operator sets it for one call.

    Raises:
        ZooError: no operator has this form.
    """

    def __init__(self, form: str | None) -> None:
        global _forced
        if form is not None:
            _check("use", form)
        self._before, _forced = _forced, form

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._before


@contextmanager
def replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace operators by functions that take the arguments of a registered form, within a `with` block and in this thread alone.

    `use` and ZOO_KERNELS have no effect there: the other operators run in their fastest form.
    """
    before, _here.functions = _replacements(), functions
    try:
        yield
    finally:
        _here.functions = before


@contextmanager
def in_place() -> Iterator[None]:
    """Use `zoo.kernels.cpu.step.STEPS` in graphs that are compiled within a `with` block, in this thread, unless a form is forced."""
    _here.in_place = True
    try:
        yield
    finally:
        _here.in_place = False


def choose(operator: str, x: Tensor, plain: str, form: str | None = None) -> Callable[..., Any]:
    """Return the form that runs this call of `operator`.

    Args:
        x: an input; its device decides.
        plain: the PyTorch form to fall back to.
        form: the caller's choice. A form forced by `use` or ZOO_KERNELS applies only if the operator has it.
    Raises:
        ZooError: `form` does not exist, or Triton is forced where it cannot run.
    """
    if not torch.compiler.is_compiling() and (operator, plain) in _logged and form is None and _nothing_forced(x):
        return kernels.get(f"{operator}.{plain}")  # a token asks dozens of times
    _look_around()
    forced = _forced if _forced is not None else os.environ.get(ENVIRONMENT)
    if (functions := _replacements()) is not None:
        if form is None and operator in functions:
            return functions[operator]
        forced = None
    if torch.compiler.is_compiling() and _in_place() and form is None and not forced:
        from zoo.kernels.cpu.step import STEPS  # which imports this module

        if operator in STEPS:
            return STEPS[operator]
    if form is not None:
        _check(f"{operator}: form", form, operator)
        chosen, reason = form, "the caller's choice"
    elif forced and f"{operator}.{forced}" in kernels:
        chosen, reason = forced, "forced"
    else:
        if forced:
            _check(ENVIRONMENT, forced)
        problem = triton_problem(x) if x.is_cuda and f"{operator}.triton" in kernels else f"the tensors are on {x.device.type}"
        chosen, reason = (plain, problem) if problem else ("triton", "the tensors are on a GPU")
    if chosen == "triton" and (problem := triton_problem(x)):
        allowed = ", ".join(sorted(_forms(operator) - {"triton"}))
        raise ZooError(f"{operator}: form 'triton' cannot run: {problem}; allowed here: {allowed}")
    if not torch.compiler.is_compiling() and (operator, chosen) not in _logged:
        _logged.add((operator, chosen))
        log.info("%s: %s (%s)", operator, chosen, reason)
    run = kernels.get(f"{operator}.{chosen}")
    return _without_autocast(run, x.device.type) if not x.is_meta and torch.is_autocast_enabled(x.device.type) else run


def _nothing_forced(x: Tensor) -> bool:
    """Return whether x is on the CPU, without autocast, and nothing forces a form or replaces operators."""
    return (
        x.is_cpu and _forced is None and _replacements() is None and ENVIRONMENT not in os.environ and not torch.is_autocast_enabled("cpu")
    )


def _without_autocast(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return `run` with autocast disabled: operators choose the dtype of their arithmetic."""

    def call(*inputs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return run(*inputs)

    return call


@untraced
def _replacements() -> Mapping[str, Callable[..., Any]] | None:
    return getattr(_here, "functions", None)


@untraced
def _in_place() -> bool:
    return getattr(_here, "in_place", False)


@untraced
def _look_around() -> bool:
    return "" in kernels


def triton_problem(x: Tensor) -> str | None:
    """Return why Triton cannot serve tensors like x, or None if it can. Touches no driver unless x is on a GPU."""
    if not _has_triton():
        return "triton is not installed (pip install 'sleep-zoo[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not x.is_cuda:
        return f"the tensors are on {x.device.type} (TRITON_INTERPRET=1 interprets kernels there, for tests)"
    if (capability := torch.cuda.get_device_capability(x.device)) < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


def triton_form(operator: str) -> Callable[..., Any]:
    """Return `run` of the operator's triton.py, imported at the first call: triton may not be installed."""

    def run(*args: Any) -> Any:
        _import_triton(operator)
        return _triton_runs[operator](*args)

    return run


_triton_runs: dict[str, Callable[..., Any]] = {}


@untraced
def _import_triton(operator: str) -> bool:
    if operator not in _triton_runs:
        _triton_runs[operator] = importlib.import_module(f"zoo.kernels.{operator}.triton").run
    return True


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _forms(operator: str | None = None) -> set[str]:
    """Return the forms of one operator, or of all."""
    return {form for name, form in (known.split(".") for known in kernels.names()) if operator in (None, name)}


def _check(field: str, form: str, operator: str | None = None) -> None:
    if form not in (forms := _forms(operator)):
        raise ZooError(f"{field}: unknown kernel form '{form}'; {nearest(form, forms)}")

"""Sphinx extension: docstrings are plain text with `code` in backticks; reStructuredText's other inline markup is escaped."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_plain: list[str] = []
"""The docstring that is being processed, escaped and without napoleon's markup."""


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what would be emphasis, a substitution or a reference, everywhere but inside backticks."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*|\\]|_\b|\b_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        lines[number] = "`".join(parts)
    _plain[:] = lines


def restore_values(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the sentences of attributes and properties: napoleon takes what stands before a colon for their type."""
    if what in ("attribute", "property"):
        lines[:] = _plain


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon, whose markup is wanted
    app.connect("autodoc-process-docstring", restore_values, priority=900)  # and after it
    return {"version": "1", "parallel_read_safe": False}

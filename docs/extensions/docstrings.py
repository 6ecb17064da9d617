"""Sphinx extension: docstrings are plain text with `code` in backticks; reStructuredText's other inline markup is escaped."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what would be emphasis, a substitution or a reference, everywhere but inside backticks."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*|\\]|_\b|\b_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        lines[number] = "`".join(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon, whose markup is wanted
    return {"version": "1", "parallel_read_safe": True}

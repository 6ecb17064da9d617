"""Sphinx extension: the directive `fields`, a table of the fields of a pydantic model or of every entry of a registry."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation

from zoo.registry import Registry

BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Fields(SphinxDirective):
    """`{fields} MODULE.NAME`, where NAME is a pydantic model, or a registry of models or of classes with `Options`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        found = getattr(import_module(module), name)
        if not isinstance(found, Registry):
            return self.parse_text_to_nodes(table(found))
        entries = {entry: found.get(entry) for entry in found.names()}
        text = "\n\n".join(f"### {entry}\n\n{summary(kind)}\n\n{table(model_of(kind))}" for entry, kind in entries.items())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def model_of(kind: Any) -> type[BaseModel]:
    return kind if issubclass(kind, BaseModel) else kind.Options


def summary(kind: type) -> str:
    return escaped((kind.__doc__ or "").partition("\n\n")[0])


def table(model: type[BaseModel]) -> str:
    """The model's fields as a Markdown table."""
    rows = [
        f"| `{name}` | `{type_of(field)}` | {default_of(field)} | {description_of(model, name, field)} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows])


def type_of(field: FieldInfo) -> str:
    bounds = [f" {sign} {getattr(rule, name)}" for rule in field.metadata for name, sign in BOUNDS.items() if hasattr(rule, name)]
    kind = re.sub(r"\b(?:\w+\.)+(\w)", r"\1", stringify_annotation(field.annotation))
    return kind.replace("|", "\\|") + ",".join(bounds)


def default_of(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    return "required" if value is PydanticUndefined else f"`{value!r}`"


def description_of(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """The field's description, or else the string below it in the class that defines it."""
    text = field.description
    for owner in model.__mro__:
        if text is None and name in vars(owner).get("__annotations__", {}):
            text = " ".join(ModuleAnalyzer.for_module(owner.__module__).find_attr_docs().get((owner.__qualname__, name), ()))
    return escaped(text or "")


def escaped(text: str) -> str:
    """Text for a cell of a Markdown table: only `code` is markup."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(re.sub(r"([*_<\[])", r"\\\1", part) if at % 2 == 0 else part for at, part in enumerate(parts))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("fields", Fields)
    return {"version": "1", "parallel_read_safe": True}

"""Seeded damage to the content of files: bytes of any, values of well-formed texts, code in pickles, hostile chat templates."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip a bit, cut the end off, or zero, insert, repeat or replace some bytes; half of the time near the start."""
    changed, kind = bytearray(content), chance.choice(["flip", "flip", "cut", "zero", "insert", "repeat", "junk"])
    at = chance.randrange(len(changed)) if chance.random() < 0.5 else min(chance.randrange(400), len(changed) - 1)
    part = slice(at, at + chance.choice([1, 8, 64]))
    if kind == "flip":
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "zero":
        changed[part] = bytes(len(changed[part]))
    elif kind == "insert":
        changed[at:at] = chance.randbytes(part.stop - at)
    elif kind == "repeat":
        changed[at:at] = changed[part]
    else:
        changed[part] = chance.randbytes(len(changed[part]))
    return bytes(changed)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: 0, lambda: -1, lambda: 1.5, lambda: math.nan, lambda: math.inf, lambda: 2**63, lambda: 10**30,
    lambda: 10**9, lambda: "", lambda: "text", lambda: "x" * 100_000, lambda: "../../etc/passwd", lambda: "/dev/zero", lambda: "a\nb",
    lambda: "\ud800", list, dict, lambda: [1, "a"], lambda: {"a": 1}, lambda: deep(50),
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def damage_tree(tree: Any, chance: random.Random) -> Any:
    """Change, remove or add one value, at any depth."""
    found = list(places(tree))
    if not found:
        return chance.choice(VALUES)()
    *path, key = chance.choice(found)
    owner = tree
    for step in path:
        owner = owner[step]
    kind = chance.choice(["value", "value", "value", "missing", "extra"])
    if kind == "value":
        owner[key] = chance.choice(VALUES)()
    elif kind == "missing":
        del owner[key]
    elif isinstance(owner, dict):
        owner[chance.choice(["extra", "", "../x", "a.b", "x" * 1000])] = chance.choice(VALUES)()
    else:
        owner.insert(0, chance.choice(VALUES)())
    return tree


def damage_text(content: bytes, form: str, chance: random.Random) -> bytes:
    """Return a well-formed text with another value."""
    if chance.random() < 0.03:
        return b"[" * 100_000 + b"\n"
    if form == "yaml":
        return yaml.safe_dump(damage_tree(yaml.safe_load(content), chance), sort_keys=False).encode()
    if form == "json":
        return json.dumps(damage_tree(json.loads(content), chance)).encode()
    lines = content.decode().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = json.dumps(damage_tree(json.loads(lines[at]), chance))
    return "".join(f"{line}\n" for line in lines).encode()


class Code:
    """An object whose unpickling makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def code(form: str, marker: Path, chance: random.Random) -> bytes:
    """Return a file that makes the folder `marker` when a careless reader opens it."""
    if form == "template":
        return chance.choice(HOSTILE).replace("MARKER", str(marker)).encode()
    file = io.BytesIO()
    if form == "npy":
        np.save(file, np.array([Code(marker)], dtype=object), allow_pickle=True)
    elif chance.random() < 0.5:
        torch.save({"model": {"weight": Code(marker)}}, file)
    else:
        pickle.dump(Code(marker), file)
    return file.getvalue()


HOSTILE = (
    "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append({'role': 'x', 'content': 'y'}) }}",
    "{{ namespace.__init__.__globals__['__builtins__']['__import__']('os').mkdir('MARKER') }}",
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 9**9**9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ missing.attribute.other }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('a\nb') }}",
)


def damaged(content: bytes, form: str, marker: Path, chance: random.Random) -> bytes:
    """Return other bytes: of a text, half of the time well-formed ones with another value; of what may hold code, sometimes code.

    Args:
        form: bytes, json, jsonl, yaml, pickle, npy or template.
        marker: a path that code would make.
    """
    while True:
        if form in ("pickle", "npy", "template") and chance.random() < 0.2:
            return code(form, marker, chance)
        if form in ("json", "jsonl", "yaml") and chance.random() < 0.6:
            changed = damage_text(content, form, chance)
        else:
            changed = damage_bytes(content, chance)
        if changed != content:
            return changed

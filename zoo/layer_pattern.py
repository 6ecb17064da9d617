"""The layer pattern language: `jet*14 attn (jet*4 swa)*2` names the mixer of every layer, first to last."""

from __future__ import annotations

import re
from functools import partial

from zoo.errors import ZooError

_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_][\w-]*)|(?P<open>\()|(?P<close>\))|\*\s*(?P<count>\d+))")
_MAX_LAYERS = 10_000


def expand(pattern: str, field: str = "layers") -> tuple[str, ...]:
    """Expand a pattern into a name for each layer.

    Grammar: pattern = item+; item = (name | "(" pattern ")") ["*" count].
    Raises a ZooError that names the field and shows the position of the mistake.
    """
    wrong = partial(_wrong, field, pattern)
    groups: list[list[list[str]]] = [[]]  # open groups; each a list of items; each item a list of names
    at = 0
    end = len(pattern.rstrip())
    countable = False
    while at < end:
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise wrong(at, "want a block name, '(', ')' or '*count'")
        start = token.end() - len(token.group().lstrip())
        if token["word"]:
            groups[-1].append([token["word"]])
        elif token["open"]:
            groups.append([])
        elif token["close"]:
            if len(groups) == 1:
                raise wrong(start, "')' without '('")
            if not groups[-1]:
                raise wrong(start, "empty parentheses")
            items = groups.pop()
            groups[-1].append([name for item in items for name in item])
        else:
            if not countable:
                raise wrong(start, "'*' must follow a block name or ')'")
            count = int(token["count"])
            if not 1 <= count * len(groups[-1][-1]) <= _MAX_LAYERS:
                raise wrong(start, f"count must be at least 1 and make at most {_MAX_LAYERS} layers")
            groups[-1][-1] = groups[-1][-1] * count
        countable = bool(token["word"] or token["close"])
        at = token.end()
    if len(groups) > 1:
        raise wrong(end, "'(' is never closed")
    names = tuple(name for item in groups[0] for name in item)
    if not names:
        raise ZooError(f"{field}: the pattern is empty; want for example 'attn gdn attn gdn' or '(attn gdn)*2'")
    return names


def _wrong(field: str, pattern: str, at: int, why: str) -> ZooError:
    return ZooError(f"{field}: {pattern!r} at character {at + 1}: {why}")

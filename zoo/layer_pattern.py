"""The layer pattern language: `jet*14 attn (jet*4 swa)*2` names the mixer of every layer, first to last."""

from __future__ import annotations

import re

from zoo.errors import ZooError

_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_][\w-]*)|(?P<open>\()|(?P<close>\))|\*\s*(?P<count>\d+))")
_MAX_LAYERS = 10_000


def expand(pattern: str) -> tuple[str, ...]:
    """Expand a pattern into the name of each layer's mixer.

    Grammar: pattern = item+; item = (name | "(" pattern ")") ["*" count].
    Raises a ZooError that shows the position of the mistake.
    """
    groups: list[list[list[str]]] = [[]]  # open groups; each a list of items; each item a list of names
    at = 0
    end = len(pattern.rstrip())
    countable = False
    while at < end:
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise _wrong(pattern, at, "want a block name, '(', ')' or '*count'")
        start = token.end() - len(token.group().lstrip())
        if token["word"]:
            groups[-1].append([token["word"]])
        elif token["open"]:
            groups.append([])
        elif token["close"]:
            if len(groups) == 1:
                raise _wrong(pattern, start, "')' without '('")
            if not groups[-1]:
                raise _wrong(pattern, start, "empty parentheses")
            items = groups.pop()
            groups[-1].append([name for item in items for name in item])
        else:
            if not countable:
                raise _wrong(pattern, start, "'*' must follow a block name or ')'")
            count = int(token["count"])
            if not 1 <= count * len(groups[-1][-1]) <= _MAX_LAYERS:
                raise _wrong(pattern, start, f"count must be at least 1 and make at most {_MAX_LAYERS} layers")
            groups[-1][-1] = groups[-1][-1] * count
        countable = bool(token["word"] or token["close"])
        at = token.end()
    if len(groups) > 1:
        raise _wrong(pattern, end, "'(' is never closed")
    names = tuple(name for item in groups[0] for name in item)
    if not names:
        raise ZooError("layers: the pattern is empty; want for example 'attn gdn attn gdn' or '(attn gdn)*2'")
    return names


def _wrong(pattern: str, at: int, why: str) -> ZooError:
    return ZooError(f"layers: {pattern!r} at character {at + 1}: {why}")

"""Text of tokens that arrive one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

UNFINISHED = "\ufffd"
"""Character with which a decoded text ends if its last character lacks bytes."""
MOST_PENDING = 8
"""Number of tokens without a complete character after which their bytes are treated as invalid text, and shown as such."""

MOST_CONTEXT = 32
"""Number of earlier tokens that are searched for text before those to decode."""


class Decoder(Protocol):
    """Maps each token in turn to the text that it completes, "" in the middle of a character."""

    def __call__(self, token: int) -> str: ...

    def flush(self) -> str:
        """Return the text of what is incomplete, after the last token."""
        ...


class ByteDecoder:
    """Tokens are bytes of UTF-8; ids above 255 have no text."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def __call__(self, token: int) -> str:
        return self._decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._decode(b"", final=True)


class TokenDecoder:
    """Text of tokens after some context: the text of both together, without that of the context.

    What a token becomes may depend on those before it: a space, or the bytes of a character. So a few of them are decoded again with
    each token.

    Args:
        decode: returns the text of tokens.
        context: tokens before the first one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        context = list(context[-MOST_CONTEXT:])
        self._before = self._with_text(context, max(0, len(context) - MOST_PENDING))
        self._pending: list[int] = []

    def __call__(self, token: int) -> str:
        self._pending.append(token)
        text = self._text()
        if text.endswith(UNFINISHED) and len(self._pending) < MOST_PENDING:
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        text = self._text() if self._pending else ""
        self._advance()
        return text

    def _text(self) -> str:
        before, both = self._decode(self._before), self._decode([*self._before, *self._pending])
        if both.startswith(before.rstrip(UNFINISHED)):
            return both[len(before) :]
        # invalid bytes change how those before them are shown
        return self._decode(self._pending)

    def _advance(self) -> None:
        """Let the pending tokens be the context of the next ones."""
        self._before, self._pending = self._with_text([*self._before, *self._pending], len(self._before)), []

    def _with_text(self, ids: list[int], start: int) -> list[int]:
        """Return these tokens from `start` on, or from earlier if they have no text, such as special ones; at most the last few."""
        while start and not self._decode(ids[start:]).strip(UNFINISHED):
            start -= 1
        return ids[start:][-MOST_CONTEXT:]

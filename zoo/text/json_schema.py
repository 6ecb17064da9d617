"""Answers that match a JSON schema: at each step, llguidance lists the tokens that can continue one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.checkpoints.plain import one_line
from zoo.errors import ZooError
from zoo.text.tokenizers import TOKENIZER, ByteTokenizer, FolderTokenizer

COMPACT: Any = {"whitespace_flexible": False, "whitespace_pattern": " ?"}  # or a model may answer with nothing but spaces
END = "<|end of answer|>"  # stands in for an end token where a tokenizer has none


class JsonSchema:
    """A schema, ready for the answers of one tokenizer.

    Raises:
        ZooError: llguidance is missing, the schema is not valid or uses a keyword that it does not support, or the tokenizer has no
            tokenizer.json.
    """

    def __init__(self, schema: Mapping[str, Any], tokenizer: ByteTokenizer, vocab_size: int) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise ZooError("a JSON schema needs pip install 'sleep-zoo[schema]'") from None
        self.vocab_size = vocab_size
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=COMPACT)
        self._matcher = LLMatcher(_tokens(tokenizer, vocab_size), grammar, log_level=0)
        _check(self._matcher)

    def answer(self) -> JsonAnswer:
        """Return the `Constraint` of one answer."""
        return JsonAnswer(self._matcher.deep_copy(), self.vocab_size)


class JsonAnswer:
    """The state of one answer, as a `Constraint`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def over(self) -> bool:
        """True once the answer is complete."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """Return which tokens may come next, bool [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        _check(self._matcher)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(bool))

    def accept(self, token: int) -> None:
        """Continue with a token. Raises ZooError if the schema turns out to be too complex."""
        self._matcher.consume_token(token)
        _check(self._matcher)


def _check(matcher: Any) -> None:
    """Raise a ZooError if llguidance has refused a schema."""
    if matcher.is_error():
        raise ZooError(f"schema: {one_line(matcher.get_error().partition('<state>')[0])[:200]}")


@lru_cache(maxsize=4)
def _tokens(tokenizer: ByteTokenizer, vocab_size: int) -> Any:
    """Return a tokenizer for llguidance."""
    from llguidance import LLTokenizer, TokenizerWrapper
    from tokenizers import Tokenizer

    if not isinstance(tokenizer, FolderTokenizer):
        end = list(tokenizer.stop) or [256]
        return LLTokenizer(TokenizerWrapper(_Bytes(end[0])), n_vocab=max(vocab_size, end[-1] + 1), eos_token=end)
    file, end = tokenizer.folder / TOKENIZER, list(tokenizer.stop) or [tokenizer.size]
    try:
        stored = Tokenizer.from_file(str(file))
        if not tokenizer.stop:
            stored.add_special_tokens([END])
        stored.no_padding()
        stored.no_truncation()
        return LLTokenizer(stored.to_str(), n_vocab=max(vocab_size, end[-1] + 1), eos_token=end)
    except Exception as error:  # tokenizers raises no other type
        raise ZooError(f"{file}: a JSON schema needs it: {one_line(error)}") from None


class _Bytes:
    """One token per byte, in the form that llguidance reads."""

    bos_token_id = None

    def __init__(self, end: int) -> None:
        self.eos_token_id = end
        self.tokens = [bytes([token]) for token in range(256)] + ([END.encode()] if end == 256 else [])
        self.special_token_ids = [end]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

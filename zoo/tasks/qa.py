"""`qa`: your own questions about your own contexts, which are evicted before the question is read."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from zoo.checkpoints.companions import GENERATION, read_companions
from zoo.errors import ZooError
from zoo.tasks.task import Batch, Split, Task, refuse_same_file, tasks
from zoo.text.corpus import END_OF_BYTES
from zoo.text.tokenizers import ByteTokenizer, load_tokenizer


class Row(NamedTuple):
    """Tokens of one question."""

    context: list[int]
    question: list[int]
    answer: list[int]


@tasks.register("qa")
class Qa(Task):
    """Rows `{"context": ..., "question": ..., "answer": ...}` of JSON lines. The context fills whole windows, which are slept on; the
    last window holds the question, in the chat template, and the answer, which carries the loss.

    The level of a token is the number of windows that its context takes. Shorter contexts are padded at the beginning; longer
    ones lose their beginning.
    """

    name = "qa"
    level_name = "windows"
    long_answers = True
    is_text = True
    paths = ("train", "test", "tokenizer")
    train: str = Field(description="file of JSON lines")
    test: str = Field(description="held-out file of JSON lines")
    tokenizer: str | None = Field(None, description="folder with a tokenizer and a chat template; default: bytes")
    vocab: int = Field(256, ge=2, description="size of the vocabulary")
    width: int = Field(512, ge=2, description="window in tokens")
    windows: int = Field(1, ge=1, description="largest number of windows that a context may take")

    @model_validator(mode="after")
    def _fits(self) -> Qa:
        refuse_same_file(self.train, self.test)
        try:
            for split in (self.train, self.test):
                with Path(split).open("rb") as file:
                    file.read(1)
            self._text  # noqa: B018  (the tokenizer can be read)
        except (OSError, ZooError) as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def window(self) -> int:
        return self.width

    def companions(self) -> dict[str, bytes]:
        """See `Task.companions`."""
        if self.tokenizer is not None:
            return read_companions(Path(self.tokenizer))
        return {GENERATION: json.dumps({"eos_token_id": END_OF_BYTES}).encode() + b"\n"}

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """See `Task.batch`. Held-out questions are taken in order. Raises ZooError: a row that is damaged or does not fit."""
        rows, rng = self._rows(split), np.random.default_rng([seed, step])
        chosen = rng.integers(0, len(rows), size) if split == "train" else np.arange(step, step + size) % len(rows)
        slept = self.windows * self.width
        ids, level = np.full((size, slept + self.width), END_OF_BYTES), np.zeros((size, slept + self.width), np.int64)
        for n, (context, question, answer) in enumerate(rows[i] for i in chosen):
            start = len(question) + slept
            ids[n, slept - len(context) : slept] = context
            ids[n, slept : start + len(answer)] = question + answer
            level[n, start : start + len(answer)] = max(1, -(-len(context) // self.width))
        return Batch(ids, level > 0, level)

    def held_out(self) -> int:
        """See `Task.held_out`."""
        return len(self._rows("test"))

    def chance(self) -> float:
        """Accuracy of the most frequent token at each place of the held-out answers."""
        answers = [row.answer for row in self._rows("test")]
        longest = max(map(len, answers))
        places = [[answer[i] for answer in answers if i < len(answer)] for i in range(longest)]
        return sum(max(map(tokens.count, set(tokens))) for tokens in places) / sum(map(len, answers))

    @cached_property
    def _text(self) -> ByteTokenizer:
        return ByteTokenizer(256, (END_OF_BYTES,)) if self.tokenizer is None else load_tokenizer(Path(self.tokenizer), self.vocab)

    @cached_property
    def _read(self) -> dict[str, list[Row]]:
        return {}

    def _rows(self, split: Split) -> list[Row]:
        """Return the tokens of every row, read once."""
        if split not in self._read:
            file = Path(self.test if split == "test" else self.train)
            try:
                lines = file.read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ZooError(f"{file}: cannot be read: {error}") from None
            self._read[split] = [self._row(line, f"{file}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]
            if not self._read[split]:
                raise ZooError(f"{file}: no rows")
        return self._read[split]

    def _row(self, line: str, label: str) -> Row:
        try:
            fields: Any = json.loads(line)
            context, question, answer = (fields[name] for name in ("context", "question", "answer"))
            asked = self._text.chat([{"role": "user", "content": question}])
            row = Row(self._text.encode(context)[-self.windows * self.width :], asked, self._text.encode(answer, special=False))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ZooError(f"{label}: want an object with the texts context, question and answer: {error}") from None
        row = row._replace(answer=[*row.answer, *(self._text.stop[:1] or [END_OF_BYTES])])
        if len(row.question) + len(row.answer) > self.width:
            raise ZooError(f"{label}: question and answer take {len(row.question) + len(row.answer)} tokens; width: {self.width}")
        return row

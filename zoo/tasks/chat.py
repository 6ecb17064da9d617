"""`chat`: conversations of your own, of several turns."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from zoo.errors import ZooError
from zoo.tasks.json_lines import JsonLines
from zoo.tasks.task import Batch, Split, tasks
from zoo.text.corpus import END_OF_BYTES

END_OF_LINE = ord("\n")

Row = list[tuple[int, bool]]
"""Tokens of a conversation, and whether each is supervised."""


@tasks.register("chat")
class Chat(JsonLines):
    """Rows `{"messages": [{"role": ..., "content": ...}, ...]}` of JSON lines, in the chat template. The answers of the assistant are
    supervised, each with the token that ends it, in every window, so the model needs `sleep_on: every`.

    The level of a token is the index of its window in the conversation, from 1. What follows the last answer is dropped, and so is
    what does not fit into `length` tokens.
    """

    name = "chat"
    form = "an object with messages, each of which has a role and a content"
    level_name = "window"
    loss_everywhere = True
    length: int = Field(2048, ge=2, description="largest number of tokens of a conversation")

    @property
    def end_of_bytes(self) -> int:
        """See `JsonLines.end_of_bytes`: without a template, a message is a line."""
        return END_OF_LINE

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """See `Task.batch`. Held-out conversations are taken in order. Raises ZooError: a row that is damaged or does not fit."""
        rows: list[Row] = self.chosen(seed, step, size, split)
        longest = max(map(len, rows))
        ids, level = np.full((size, longest), END_OF_BYTES), np.zeros((size, longest), np.int64)
        window = np.arange(longest) // self.width + 1
        for n, row in enumerate(rows):
            ids[n, : len(row)] = [token for token, _ in row]
            level[n, : len(row)] = window[: len(row)] * [supervised for _, supervised in row]
        return Batch(ids, level > 0, level)

    def chance(self) -> float:
        """Share of the most frequent token among the held-out answers."""
        answers = [token for row in self.rows("test") for token, supervised in row if supervised]
        return float(np.bincount(answers).max() / len(answers))

    def row(self, fields: Any) -> Row:
        """See `JsonLines.row`."""
        messages, row, written = fields["messages"], [], ""
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = self.text.render(messages[:n]), self.text.render(messages[: n + 1], add_generation_prompt=False)
            if not (asked.startswith(written) and answered.startswith(asked)):
                raise ZooError(f"messages.{n}: the chat template changes earlier text when this message is added")
            answer = self.text.encode(answered[len(asked) :], special=False)
            ends = [at for at, token in enumerate(answer, 1) if token in self.text.stop]
            if not self.text.templates and ends != [len(answer)]:
                raise ZooError(f"messages.{n}: {message['content']!r} has several lines, which needs a chat template")
            if not ends:
                raise ZooError(f"messages.{n}: the chat template ends it with none of the tokens {self.text.stop}, which end an answer")
            row += [(token, False) for token in self.text.encode(asked[len(written) :], special=False)]
            row += [(token, at <= ends[-1]) for at, token in enumerate(answer, 1)]
            written = answered
        row = row[: self.length]
        if not any(supervised for _, supervised in row[1:]):
            raise ZooError(f"messages: no answer of the assistant within length: {self.length} tokens")
        return row

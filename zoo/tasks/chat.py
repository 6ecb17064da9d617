"""`chat`: conversations of your own, of several turns."""

from __future__ import annotations

import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from zoo.errors import ZooError, counted
from zoo.tasks.json_lines import JsonLines
from zoo.tasks.task import Batch, Split, tasks
from zoo.text.corpus import END_OF_BYTES

ROLES = ("system", "developer", "user", "assistant")

Row = list[tuple[int, bool]]
"""Tokens of a conversation, and whether each is supervised."""


@tasks.register("chat")
class Chat(JsonLines):
    """Rows `{"messages": [{"role": ..., "content": ...}, ...]}` of JSON lines, in the chat template; content is a text or a list of
    text parts. The answers of the assistant are supervised, each with the token that ends it, in every window, so the model needs
    `sleep_on: every`; one with `"weight": 0` is only read. Without a tokenizer, a message is a line of bytes.

    The level of a token is the index of its window in the conversation, from 1. What follows the last answer is dropped, and so is
    what does not fit into `length` tokens.
    """

    name = "chat"
    form = "an object with a list of messages"
    end_of_bytes = ord("\n")  # without a template, a message is a line
    level_name = "window"
    loss_everywhere = True
    length: int = Field(2048, ge=2, description="largest number of tokens of a conversation")

    @model_validator(mode="after")
    def _has_template(self) -> Chat:
        if self.tokenizer is not None and not self.text.templates:
            raise ValueError(f"tokenizer: {self.tokenizer}: has no chat template")
        return self

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
        for field in ("tools", "functions"):
            if fields.get(field):
                raise ZooError(f"{field}: conversations with tools are not supported")
        messages, row, written = [self._message(message, f"messages.{n}") for n, message in enumerate(fields["messages"])], [], ""
        weights = [message.pop("weight", 1) for message in messages]
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
                raise ZooError(
                    f"messages.{n}: the chat template ends it with none of the tokens {self.text.stop}, which end an answer: eos_token_id"
                )
            row += [(token, False) for token in self.text.encode(asked[len(written) :], special=False)]
            row += [(token, weights[n] == 1 and at <= ends[-1]) for at, token in enumerate(answer, 1)]
            written = answered
        if not row:
            raise ZooError("messages: none of the assistant")
        return row

    def fitted(self, rows: list[Row], file: Path) -> list[Row]:
        """See `JsonLines.fitted`: long conversations lose their end, and those without an answer before it are left out."""
        kept = [row[: self.length] for row in rows if any(supervised for _, supervised in row[1 : self.length])]
        if not kept:
            raise ZooError(f"{file}: no conversation has an answer within length: {self.length} tokens")
        if cut := sum(len(row) > self.length for row in rows):
            left = len(rows) - len(kept)
            warnings.warn(
                f"{file}: {cut} of {counted(len(rows), 'conversation')} take more than length: {self.length} tokens and lose their end; "
                f"{left} of them, which have no answer before it, are left out",
                stacklevel=2,
            )
        return kept

    @cached_property
    def _fields_read(self) -> set[str]:
        """Names of the fields of a message that have an effect."""
        return {"role", "content", "weight", *re.findall(r"\w+", " ".join(self.text.templates.values()))}

    def _message(self, message: Any, label: str) -> dict[str, Any]:
        """Return a message with its text parts joined. Raises ZooError, starting with `label`."""
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ZooError(f"{label}: want an object with role and content")
        if message["role"] not in ROLES:
            raise ZooError(f"{label}.role: {message['role']!r}; allowed: {', '.join(ROLES)}")
        for field in ("tool_calls", "function_call"):
            if message.get(field):
                raise ZooError(f"{label}.{field}: calls are not supported")
        if message.get("weight", 1) not in (0, 1):
            raise ZooError(f"{label}.weight: {message['weight']!r}; allowed: 0, 1")
        if unread := [field for field, value in message.items() if value and field not in self._fields_read]:
            raise ZooError(f"{label}.{unread[0]}: the chat template does not read it; remove it")
        parts = message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": message["content"]}]
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
        joined = [text for text in texts if isinstance(text, str)]
        if len(joined) < len(texts):
            raise ZooError(f"{label}.content: want a text, or a list of text parts")
        if message["role"] == "assistant" and not any(joined):
            raise ZooError(f"{label}.content: empty; want a text")
        return {**message, "content": "".join(joined)}

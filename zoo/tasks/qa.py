"""`qa`: your own questions about your own contexts, which are evicted before the question is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from zoo.errors import ZooError, counted
from zoo.tasks.json_lines import JsonLines
from zoo.tasks.task import Batch, Split, tasks
from zoo.text.corpus import END_OF_BYTES


class Row(NamedTuple):
    """Tokens of one question."""

    context: list[int]
    question: list[int]
    answer: list[int]


@tasks.register("qa")
class Qa(JsonLines):
    """Rows `{"context": ..., "question": ..., "answer": ...}` of JSON lines. The context fills whole windows, which are slept on; the
    last window holds the question, in the chat template, and the answer, which carries the loss.

    The level of a token is the number of windows that its context takes. Shorter contexts are padded at the beginning; longer
    ones lose their beginning.
    """

    name = "qa"
    form = "an object with the texts context, question and answer"
    level_name = "windows"
    long_answers = True
    windows: int = Field(1, ge=1, description="largest number of windows that a context may take")

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """See `Task.batch`. Held-out questions are taken in order. Raises ZooError: a row that is damaged or does not fit."""
        slept = self.windows * self.width
        ids, level = np.full((size, slept + self.width), END_OF_BYTES), np.zeros((size, slept + self.width), np.int64)
        for n, (context, question, answer) in enumerate(self.chosen(seed, step, size, split)):
            start = len(question) + slept
            ids[n, slept - len(context) : slept] = context
            ids[n, slept : start + len(answer)] = question + answer
            level[n, start : start + len(answer)] = max(1, -(-len(context) // self.width))
        return Batch(ids, level > 0, level)

    def chance(self) -> float:
        """Accuracy of the most frequent token at each place of the held-out answers."""
        answers = [row.answer for row in self.rows("test")]
        longest = max(map(len, answers))
        places = [[answer[i] for answer in answers if i < len(answer)] for i in range(longest)]
        return sum(max(map(tokens.count, set(tokens))) for tokens in places) / sum(map(len, answers))

    def fitted(self, rows: list[Row], file: Path) -> list[Row]:
        """See `JsonLines.fitted`: long contexts lose their beginning."""
        room = self.windows * self.width
        if cut := sum(len(row.context) > room for row in rows):
            warnings.warn(f"{file}: {cut} of {counted(len(rows), 'context')} cut at the beginning: more than {room} tokens", stacklevel=2)
        return [row._replace(context=row.context[-room:]) for row in rows]

    def row(self, fields: Any) -> Row:
        """See `JsonLines.row`."""
        context, question, answer = (fields[name] for name in ("context", "question", "answer"))
        for name, text in (("context", context), ("question", question), ("answer", answer)):
            if not isinstance(text, str):
                raise ZooError(f"{name}: {text!r}; want a text")
        if not answer:
            raise ZooError("answer: empty; want a text")
        asked, said = self.text.chat([{"role": "user", "content": question}]), self.text.encode(answer, special=False)
        row = Row(self.text.encode(context), asked, [*said, *(self.text.stop[:1] or [END_OF_BYTES])])
        if len(row.question) + len(row.answer) > self.width:
            raise ZooError(f"question and answer take {len(row.question) + len(row.answer)} tokens; width: {self.width}")
        return row

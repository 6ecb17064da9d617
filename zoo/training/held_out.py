"""Held-out data that is named on the command line: text, token ids or questions become a task."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zoo.checkpoints.companions import has_tokenizer
from zoo.config import ModelConfig
from zoo.errors import ZooError, counted
from zoo.tasks import Batch, Task
from zoo.tasks.chat import Chat
from zoo.tasks.qa import Qa
from zoo.tasks.task import Split
from zoo.tasks.text import by_window, majority, open_tokens
from zoo.text.corpus import documents
from zoo.text.tokenizers import load_tokenizer
from zoo.training.config import TrainConfig

WIDTH = 512  # width of the windows by which results are shown, where the model has none


class Excerpts(Task):
    """Consecutive sequences of a held-out text, each a separate stream. Every token but the first of a sequence is supervised."""

    name = "text"
    level_name = "window"
    loss_everywhere = True
    is_text = True
    file: str = Field(description="a .npy file of token ids, or text as `zoo tokenize` reads it")
    folder: str = Field(description="folder of the model, with its tokenizer")
    vocab: int = Field(description="size of the vocabulary")
    length: int = Field(description="number of tokens in a sequence")
    width: int = Field(description="window in tokens")

    def __str__(self) -> str:
        return f"{self.file}, sequences of {self.length} tokens"

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def window(self) -> int:
        return self.width

    @cached_property
    def tokens(self) -> NDArray[np.integer[Any]]:
        """Tokens of the whole file, with an end token after every document. Raises ZooError."""
        if self.file.endswith(".npy"):
            try:
                tokens: NDArray[np.integer[Any]] = open_tokens(self.file, "--data")
            except ValueError as error:
                raise ZooError(str(error)) from None
        else:
            tokenizer = load_tokenizer(Path(self.folder), self.vocab)
            texts = documents([Path(self.file)], "text")
            tokens = np.array([i for text in texts for i in (*tokenizer.encode(text, special=False), *tokenizer.stop[:1])], np.int64)
        if len(tokens) < 2:
            raise ZooError(f"--data: {self.file}: {counted(len(tokens), 'token')}; want at least 2")
        return tokens

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """Return sequences `step` to `step + size - 1` of the file, whose last one is padded. Raises ZooError for too large a token."""
        ids = np.asarray(self.tokens[step * self.length : (step + size) * self.length]).astype(np.int64)
        if ids.max() >= self.vocab:
            raise ZooError(f"--data: {self.file}: token {ids.max()}; the model has {self.vocab}")
        lengths = (len(ids) - self.length * np.arange(size)).clip(0, self.length)
        return by_window(np.pad(ids, (0, size * self.length - len(ids))).reshape(size, self.length), self.width, lengths)

    def held_out(self) -> int:
        """See `Task.held_out`."""
        return (len(self.tokens) + self.length - 2) // self.length  # a single token at the end has nothing before it

    def chance(self) -> float:
        return majority(self.tokens)


def held_out_task(file: Path, folder: Path, model: ModelConfig, run: TrainConfig | None, length: int | None) -> Task:
    """Return the task of a held-out file.

    Args:
        file: .jsonl of questions as the task `qa` reads them or of conversations as `chat` reads them, token ids, or text.
        folder: folder of the model, with its tokenizer.
        run: the run that trained the model; its layout of sequences is kept if it trains on such data.
        length: number of tokens in a sequence of text, default: of the run, else four windows; largest number in a conversation.
    Raises:
        ZooError: the file cannot be read, or `length` is given for questions.
    """
    trained = {} if run is None else run.task
    keys = _keys_of_first_row(file)
    like_run = trained.get("name") == "qa" and "question" in keys
    width = model.window or (trained.get("width", WIDTH) if like_run else WIDTH)
    fields: dict[str, Any] = {"train": str(file), "test": str(file), "vocab": model.vocab_size, "width": width}
    fields["tokenizer"] = str(folder) if has_tokenizer(folder) else None
    if "messages" in keys:
        return Chat.model_construct(**fields, length=length or (trained.get("length", 2048) if trained.get("name") == "chat" else 2048))
    if "question" in keys:
        if length is not None:
            raise ZooError(f"--length: {length}; {file} holds questions, which have their own lengths")
        windows = trained.get("windows", 1) if like_run else 2**20  # all of every context
        questions = Qa.model_construct(**fields, windows=windows)
        longest = max(-(-len(row.context) // width) for row in questions.rows("test"))
        return questions.model_copy(update={"windows": max(1, min(windows, longest))})  # with the rows that were read
    if length is None:
        length = trained.get("length", 2048) if trained.get("name") == "text" else 4 * width
    text: dict[str, Any] = {"file": str(file), "folder": str(folder), "vocab": model.vocab_size, "width": width}
    excerpts = Excerpts(**text, length=length)
    return excerpts.model_copy(update={"length": min(length, len(excerpts.tokens))})  # with the tokens that were read


def _keys_of_first_row(file: Path) -> set[str]:
    """Return the keys of the object in the first row of a file of JSON lines; none for other files."""
    if file.suffix != ".jsonl":
        return set()
    try:
        with file.open(encoding="utf-8-sig") as lines:
            line = next((line for line in lines if line.strip()), None)
            first = None if line is None else json.loads(line)
    except (OSError, ValueError) as error:
        raise ZooError(f"--data: {file}: cannot be read as JSON lines: {error}") from None
    if line is None:
        raise ZooError(f"--data: {file}: no rows")
    return set(first) if isinstance(first, dict) else set()

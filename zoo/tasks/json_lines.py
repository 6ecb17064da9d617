"""The base class of tasks that read JSON lines of text."""

from __future__ import annotations

import json
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from zoo.checkpoints.companions import GENERATION, has_tokenizer, read_companions
from zoo.errors import ZooError
from zoo.tasks.task import Split, Task, refuse_same_file
from zoo.text.corpus import END_OF_BYTES
from zoo.text.tokenizers import ByteTokenizer, FolderTokenizer, load_tokenizer


class JsonLines(Task):
    """Rows of two files, which `row` turns into tokens; they are read once. Subclasses set `form` and implement `row`."""

    form: ClassVar[str]
    """Form of a line, as errors name it."""
    end_of_bytes: ClassVar[int] = END_OF_BYTES
    """Token that ends an answer in bytes."""
    is_text = True
    paths = ("train", "test", "tokenizer")
    train: str = Field(description="file of JSON lines")
    test: str = Field(description="held-out file of JSON lines")
    tokenizer: str | None = Field(None, description="folder with a tokenizer and a chat template; default: bytes")
    vocab: int | None = Field(None, ge=2, description="size of the vocabulary; default: of the tokenizer")
    width: int = Field(512, ge=2, description="window in tokens")

    @model_validator(mode="after")
    def _fits(self) -> JsonLines:
        refuse_same_file(self.train, self.test)
        if self.tokenizer is not None and not Path(self.tokenizer).is_dir():
            raise ValueError(
                f"tokenizer: {self.tokenizer}: {'a file; want its folder' if Path(self.tokenizer).exists() else 'no such folder'}"
            )
        try:
            self.text  # noqa: B018  (the tokenizer can be read)
        except ZooError as error:
            raise ValueError(str(error)) from None
        for field in ("train", "test"):
            try:
                with Path(getattr(self, field)).open("rb") as file:
                    file.read(1)
            except OSError as error:
                raise ValueError(f"{field}: {getattr(self, field)}: {error.strerror}") from None
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocab or (self.text.size if isinstance(self.text, FolderTokenizer) else 256)

    @property
    def window(self) -> int:
        return self.width

    def companions(self) -> dict[str, bytes]:
        """See `Task.companions`."""
        if self.tokenizer is not None:
            return read_companions(Path(self.tokenizer))
        return {GENERATION: json.dumps({"eos_token_id": self.end_of_bytes}).encode() + b"\n"}

    def held_out(self) -> int:
        """See `Task.held_out`."""
        return len(self.rows("test"))

    @abstractmethod
    def row(self, fields: Any) -> Any:
        """Return the tokens of the object in a line. Raises ZooError for one that does not fit; other errors mean another form."""

    def fitted(self, rows: list[Any], file: Path) -> list[Any]:
        """Return the rows as they are used, with a warning about those that are cut or left out."""
        return rows

    def chosen(self, seed: int, step: int, size: int, split: Split) -> list[Any]:
        """Return the rows of a batch: random ones, and held-out ones in order. Raises ZooError: as `rows`."""
        rows, rng = self.rows(split), np.random.default_rng([seed, step])
        return [rows[i] for i in (rng.integers(0, len(rows), size) if split == "train" else np.arange(step, step + size) % len(rows))]

    @cached_property
    def text(self) -> ByteTokenizer:
        """The tokenizer."""
        if self.tokenizer is None:
            return ByteTokenizer(256, (self.end_of_bytes,))
        folder = Path(self.tokenizer)
        return load_tokenizer(folder, self.vocab or (2**32 if has_tokenizer(folder) else 256))

    @cached_property
    def _read(self) -> dict[str, list[Any]]:
        return {}

    def rows(self, split: Split) -> list[Any]:
        """Return the tokens of every row. Raises ZooError: a row that is damaged or does not fit."""
        if split not in self._read:
            file = Path(self.test if split == "test" else self.train)
            try:
                lines = file.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ZooError(f"{file}: cannot be read: {error}") from None
            rows = [self._row(line, f"{file}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]
            if not rows:
                raise ZooError(f"{file}: no rows")
            self._read[split] = self.fitted(rows, file)
        return self._read[split]

    def _row(self, line: str, label: str) -> Any:
        try:
            return self.row(json.loads(line))
        except ZooError as error:
            raise ZooError(f"{label}: {error}") from None
        except json.JSONDecodeError as error:
            raise ZooError(f"{label}: not JSON: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            lacking = f"; {error} is missing" if isinstance(error, KeyError) else ""
            raise ZooError(f"{label}: want {self.form}{lacking}") from None

"""Text to token ids and back: the tokenizer of a checkpoint folder, or bytes."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.text.chat_templates import Messages, plain, render


class ByteTokenizer:
    """One token per UTF-8 byte; ids above 255 decode to nothing.

    Raises:
        ZooError: `vocab_size` is below 256.
    """

    stop: tuple[int, ...] = ()
    """Ids that end an answer."""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 256:
            raise ZooError(f"vocab_size: {vocab_size}; text in bytes needs 256, and the model has no tokenizer.json")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decoder(self) -> Callable[[int], str]:
        """Return a function that maps each token in turn to the text it completes: "" in the middle of a character."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda token: decode(bytes([token])) if token < 256 else ""

    def chat(self, messages: Messages) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins."""
        return self.encode(plain(messages))


class FolderTokenizer(ByteTokenizer):
    """The `tokenizer.json` of a checkpoint folder, with its end tokens and its chat template if it has one.

    Raises:
        ZooError: a file cannot be read, or the tokenizer has more than `vocab_size` tokens.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        path = folder / "tokenizer.json"
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ZooError(f"{path}: needs pip install 'sleep-zoo[serve]'") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ZooError(f"{path}: cannot be read: {error}") from None
        if self._tokenizer.get_vocab_size() > vocab_size:
            raise ZooError(f"{path}: {self._tokenizer.get_vocab_size()} tokens; the model has {vocab_size}")
        ends = {**_read(folder / "config.json"), **_read(folder / "generation_config.json")}.get("eos_token_id")
        self.stop = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        config = _read(folder / "tokenizer_config.json")
        self._template = config.get("chat_template")
        self._special = {name: _content(value) for name, value in config.items() if name.endswith("_token")}

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_without_surrogates(text)).ids)

    def decoder(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def chat(self, messages: Messages) -> list[int]:
        if not isinstance(self._template, str):
            return super().chat(messages)
        text = render(self._template, messages, self._special)
        return list(self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False).ids)


def load_tokenizer(folder: Path | None, vocab_size: int) -> ByteTokenizer:
    """Return the tokenizer in a checkpoint's folder, or bytes if it has none. Raises ZooError."""
    if folder is not None and (folder / "tokenizer.json").is_file():
        return FolderTokenizer(folder, vocab_size)
    return ByteTokenizer(vocab_size)


def _read(file: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none if there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ZooError(f"{file}: cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which the tokenizer refuses."""
    return text.encode("utf-8", errors="replace").decode()


def _content(token: Any) -> Any:
    """Return a special token as text: the file holds text, or a mapping with its `content`."""
    return token.get("content") if isinstance(token, dict) else token

"""Text to tokens and back: the tokenizer of a checkpoint folder, or bytes."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

Messages = Iterable[Mapping[str, str]]


class Bytes:
    """A token is a byte of UTF-8; tokens above 255 stand for nothing."""

    stop: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 256:
            raise ZooError(f"vocab_size: {vocab_size}; text in bytes needs 256, and the model has no tokenizer.json")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decoder(self) -> Callable[[int], str]:
        """A function from each token in turn to the text that is certain with it."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda token: decode(bytes([token])) if token < 256 else ""

    def chat(self, messages: Messages) -> list[int]:
        """A conversation up to where the model is to answer."""
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: ")


class FromFolder(Bytes):
    """`tokenizer.json` of a checkpoint, its end tokens, and its chat template if it has one."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ZooError(f"{folder / 'tokenizer.json'}: needs pip install 'sleep-zoo[serve]'") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ZooError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from None
        if self._tokenizer.get_vocab_size() > vocab_size:
            raise ZooError(f"{folder / 'tokenizer.json'}: {self._tokenizer.get_vocab_size()} tokens; the model has {vocab_size}")
        ends = {**_read(folder / "config.json"), **_read(folder / "generation_config.json")}.get("eos_token_id")
        self.stop = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        self._config = _read(folder / "tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_whole(text)).ids)

    def decoder(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def chat(self, messages: Messages) -> list[int]:
        template = self._config.get("chat_template")
        if not isinstance(template, str):
            return super().chat(messages)
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        special = {key: _content(value) for key, value in self._config.items() if key.endswith("_token")}
        try:
            page = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
            text = page.render(messages=list(messages), add_generation_prompt=True, **special)
        except Exception as error:  # a template is somebody else's program
            raise ZooError(f"tokenizer_config.json: chat_template: {error}") from None
        return list(self._tokenizer.encode(_whole(text), add_special_tokens=False).ids)


def text_of(folder: Path | None, vocab_size: int) -> Bytes:
    """The tokenizer in a checkpoint's folder, or bytes where there is none. Raises ZooError."""
    if folder is not None and (folder / "tokenizer.json").is_file():
        return FromFolder(folder, vocab_size)
    return Bytes(vocab_size)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ZooError(f"{file}: cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _whole(text: str) -> str:
    """Half a surrogate pair is no text."""
    return text.encode("utf-8", errors="replace").decode()


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token

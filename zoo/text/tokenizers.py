"""Text to token ids and back: the tokenizer of a checkpoint's folder, or bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.checkpoints.companions import GENERATION, has_tokenizer
from zoo.checkpoints.own import CONFIG
from zoo.checkpoints.plain import one_line
from zoo.checkpoints.stored import read_json
from zoo.config import read_yaml
from zoo.errors import ZooError
from zoo.text.chat_templates import Messages, choose, plain, read_templates, render
from zoo.text.decoding import MOST_CONTEXT, UNFINISHED, ByteDecoder, Decoder, TokenDecoder

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPACE = "\u2581"
"""How vocabularies of SentencePiece write a space."""
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
# byte-level vocabularies, from GPT-2 on, write a byte that cannot be printed as one of the characters from 256 on
BYTE_OF = {
    chr(code): byte for byte, code in zip([*PRINTED, *sorted({*range(256)} - {*PRINTED})], [*PRINTED, *range(256, 324)], strict=True)
}


class ByteTokenizer:
    """One token per UTF-8 byte, in a vocabulary of 256.

    Args:
        stop: ids that end an answer.
    Raises:
        ZooError: another `vocab_size`.
    """

    def __init__(self, vocab_size: int = 256, stop: Iterable[int] = (), templates: Mapping[str, str] | None = None) -> None:
        if vocab_size != 256:
            raise ZooError(f"vocab_size: {vocab_size}; text in bytes needs 256, and the model has no tokenizer, such as a {TOKENIZER}")
        self.stop: tuple[int, ...] = tuple(stop)
        """Ids that end an answer."""
        self.templates: Mapping[str, str] = templates or {}
        """Chat templates by name."""
        self.special: Mapping[str, str] = {}
        """Special tokens, by names such as "eos_token"."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text, with the special tokens that the tokenizer adds at its ends unless `special` is False."""
        return list(text.encode("utf-8", errors="replace"))

    def decoder(self, context: Sequence[int] = ()) -> Decoder:
        """Return a decoder of the tokens that follow those of `context`."""
        return ByteDecoder()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens."""
        decode = self.decoder()
        return "".join(map(decode, ids)) + decode.flush()

    def name_of(self, token: int) -> str:
        """Return a token as chat templates write it."""
        return chr(token)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of one token, which need not be whole characters."""
        return bytes([token]) if token < 256 else b""

    def count_bytes(self, ids: Sequence[int], context: Sequence[int] = ()) -> int:
        """Return the number of bytes in the text of tokens that follow `context`. Special tokens have none."""
        return sum(token not in self.stop for token in ids)

    def render(self, messages: Messages, *, template: str | None = None, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return a conversation as text, up to where the answer begins.

        Args:
            template: name of a chat template; default: "tool_use" if there are tools and it exists, else "default". Without any
                template, one line per message.
            variables: values for the template, such as `tools` and `documents`; see `zoo.text.chat_templates.render`.
        Raises:
            ZooError: there is no such template, or it fails.
        """
        chosen = choose(self.templates, template, variables.get("tools"))
        if chosen is None:
            return plain(messages, add_generation_prompt=add_generation_prompt)
        return render(chosen, messages, **{**self.special, **variables, "add_generation_prompt": add_generation_prompt})

    def chat(self, messages: Messages, **variables: Any) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins. Takes the arguments of `render`, and raises its errors."""
        return self.encode(self.render(messages, **variables), special=False)


class FolderTokenizer(ByteTokenizer):
    """The tokenizer of a checkpoint's folder: through transformers where that is installed, otherwise from tokenizer.json.

    Raises:
        ZooError: a file cannot be read, or the tokenizer has more than `vocab_size` tokens.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        backend = _from_transformers(folder)
        if backend is None or (backend.size > vocab_size and (folder / TOKENIZER).is_file()):  # transformers may have added tokens
            backend = _from_tokenizers(folder)
        if backend.size > vocab_size:
            raise ZooError(f"{folder / TOKENIZER}: {backend.size} tokens; the model has {vocab_size}")
        self.folder, self._backend = folder.absolute(), backend
        self.size = backend.size
        """Number of tokens."""
        self.special = self._backend.special
        self.templates = read_templates(folder)
        end = self._backend.id_of(self.special.get("eos_token", ""))
        self.stop = end_tokens(folder, vocab_size, () if end is None else (end,))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        try:
            return self._backend.encode(text.encode("utf-8", errors="replace").decode(), special)  # lone surrogates are refused
        except Exception as error:  # a damaged vocabulary
            raise ZooError(f"{self.folder}: the tokenizer cannot encode: {one_line(error)}") from None

    def decoder(self, context: Sequence[int] = ()) -> Decoder:
        return TokenDecoder(self._backend.decode, context)

    def name_of(self, token: int) -> str:
        return self._backend.name_of(token) or ""

    def bytes_of(self, token: int) -> bytes:
        text, name = self._backend.decode([token]), self.name_of(token)
        if (spaced := name.replace(SPACE, " ")) == " " + text:  # SentencePiece leaves out the space before a text
            return spaced.encode()
        if UNFINISHED not in text:
            return text.encode()
        if fallback := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes([int(fallback[1], 16)])
        return bytes(BYTE_OF[letter] for letter in name) if all(letter in BYTE_OF for letter in name) else text.encode()

    def count_bytes(self, ids: Sequence[int], context: Sequence[int] = ()) -> int:
        before = list(context[-MOST_CONTEXT:])
        both, alone = self._backend.decode([*before, *ids]), self._backend.decode(before)
        return len(both.encode()) - len(alone.encode())


def load_tokenizer(folder: Path | None, vocab_size: int) -> ByteTokenizer:
    """Return the tokenizer in a checkpoint's folder, or bytes if it has none. Raises ZooError."""
    if folder is not None and has_tokenizer(folder):
        return FolderTokenizer(folder, vocab_size)
    if folder is None or vocab_size != 256:
        return ByteTokenizer(vocab_size)
    return ByteTokenizer(vocab_size, end_tokens(folder, vocab_size), read_templates(folder))


def end_tokens(folder: Path, vocab_size: int, more: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the ids that end an answer: those of generation_config.json or else of the config, and `more`.

    In a config they may be under `text_config`, and in a list. Raises ZooError if a file is damaged.
    """
    configs = [_read(folder / GENERATION), _read(folder / "config.json")]
    if (folder / CONFIG).is_file():
        configs.append(read_yaml(folder / CONFIG).get("upstream") or {})
    configs.append(_read(folder / "bundle.json").get("config", {}).get("upstream") or {})
    listed = next(filter(None, (configured_ends(config, vocab_size) for config in configs)), [])
    return tuple(dict.fromkeys([*listed, *more]))


def configured_ends(config: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Return the ids that end an answer according to the config of a checkpoint, or of the text model in it; may be empty."""
    for fields in (config, config.get("text_config")):
        ends = fields.get("eos_token_id") if isinstance(fields, Mapping) else None
        listed = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and 0 <= end < vocab_size]
        if listed:
            return listed
    return []


class Backend(NamedTuple):
    """The functions of a tokenizer, whichever library provides them."""

    encode: Callable[[str, bool], list[int]]
    """Takes a text, and whether to add special tokens at its ends."""
    decode: Callable[[Sequence[int]], str]
    """Returns the text of tokens, without special ones."""
    id_of: Callable[[str], int | None]
    name_of: Callable[[int], str | None]
    """Returns a token as it is written in the vocabulary."""
    size: int
    special: Mapping[str, str]


def _from_transformers(folder: Path) -> Backend | None:
    """Return the tokenizer of transformers; None if that is not installed, or if tokenizer.json is all there is to read."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an architecture that it does not know, or files that it cannot read
        if (folder / TOKENIZER).is_file():
            return None
        raise ZooError(f"{folder}: transformers cannot read the tokenizer: {one_line(error)}") from None

    def encode(text: str, special: bool) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=special, truncation=False, padding=False, verbose=False))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    return Backend(encode, decode, vocabulary.get, tokenizer.convert_ids_to_tokens, size, tokenizer.special_tokens_map)


def _from_tokenizers(folder: Path) -> Backend:
    path = folder / TOKENIZER
    if not path.is_file():
        raise ZooError(f"{folder}: there is no {TOKENIZER}; pip install transformers, which reads other formats")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ZooError(f"{path}: needs pip install 'sleep-zoo[serve]'") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ZooError(f"{path}: cannot be read: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _read(folder / SETTINGS)
    if "added_tokens_decoder" not in settings:
        settings |= _read(folder / "special_tokens_map.json")

    def encode(text: str, special: bool) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=special).ids)

    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    return Backend(encode, tokenizer.decode, tokenizer.token_to_id, tokenizer.id_to_token, size, _special_tokens(settings))


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens of tokenizer_config.json, which holds each as text or as an object with its `content`."""
    more = settings.get("extra_special_tokens")
    named = {name: value for name, value in settings.items() if name.endswith("_token")} | (more if isinstance(more, dict) else {})
    content = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in content.items() if isinstance(value, str)}


def _read(file: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none if there is no such file."""
    return read_json(file) if file.is_file() else {}

"""Files that travel with the weights of a model: tokenizer, chat templates, generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model", "*.tiktoken")
"""Files that are each a tokenizer, or the main part of one."""
TOKENIZER_PARTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
GENERATION = "generation_config.json"
COMPANIONS = (*TOKENIZERS, *TOKENIZER_PARTS, *TEMPLATES, GENERATION)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer in any format."""
    return any(file.is_file() for pattern in TOKENIZERS for file in folder.glob(pattern))


def same_tokenizer(ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> bool:
    """Return whether two sets of these files have the same vocabulary, as far as they hold the same kind of tokenizer."""
    common = [name for name in tokenizers(ours) if name in theirs]
    return all(ours[name] == theirs[name] or _vocabulary(name, ours[name]) == _vocabulary(name, theirs[name]) for name in common)


def tokenizers(companions: Mapping[str, bytes]) -> list[str]:
    """Return the names of the files that are each a tokenizer."""
    return [name for name in companions if any(fnmatch(name, pattern) for pattern in TOKENIZERS)]


def _vocabulary(name: str, content: bytes) -> Any:
    """Return what decides which token has which id: of tokenizer.json, which libraries write in various ways, the model."""
    if name != "tokenizer.json":
        return content
    try:
        fields = json.loads(content)
        return fields["model"], fields.get("added_tokens")
    except (ValueError, KeyError, TypeError):
        return content


def read_companions(folder: Path) -> dict[str, bytes]:
    """Return the contents of these files in a folder, by name. Raises ZooError."""
    found = [file for pattern in COMPANIONS for file in sorted(folder.glob(pattern)) if file.is_file()]
    try:
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}
    except OSError as error:
        raise ZooError(f"{error.filename}: cannot be read: {error.strerror}") from None


def write_companions(companions: Mapping[str, bytes], folder: Path) -> None:
    """Write the files to a folder."""
    for name, content in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

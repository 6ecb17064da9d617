"""The checksum in the metadata of our safetensors files. Files without one, such as those of upstream projects, are accepted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from zoo.checkpoints.plain import one_line
from zoo.errors import ZooError

FIELD = "zoo.sha256"
DAMAGED = f"damaged: its tensors do not match its {FIELD}"


PLAIN = {"format": "pt"}
"""Other metadata of a weights file."""


def metadata(tensors: Mapping[str, Tensor], fields: Mapping[str, str] = PLAIN) -> dict[str, str]:
    """Return the metadata for a safetensors file of these tensors: `fields` and the checksum of both."""
    return {**fields, FIELD: _checksum(((name, tensors[name]) for name in sorted(tensors)), fields)}


def add_checksum(file: Path, out: Path) -> None:
    """Copy a safetensors file that was written without a checksum; the tensors are streamed."""
    fields = {**PLAIN, FIELD: _checksum(_read(file), PLAIN)}
    with file.open("rb") as source, out.open("wb") as target:
        header = read_header(source)
        text = json.dumps({**header, "__metadata__": fields}).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 2**24)


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Return the header of an open safetensors file that `safe_open` accepts. The tensors follow."""
    header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header


def verify(file: Path) -> None:
    """Raise ZooError if a safetensors file cannot be read, or its contents do not match the checksum in its metadata."""
    try:
        with safe_open(file, "pt") as stored:
            fields = stored.metadata() or {}
        whole = FIELD not in fields or _matches(_read(file), fields)
    except Exception as error:  # a damaged header can make safetensors raise anything
        raise ZooError(f"{file}: cannot be read: {one_line(error)}") from None
    if not whole:
        raise ZooError(f"{file}: {DAMAGED}")


def read_verified(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a small safetensors file. Raises ZooError: as `verify`.

    Every tensor read through `safe_open` leaks memory (safetensors 0.8), which adds up where small files are read again and again.
    """
    try:
        content = file.read_bytes()
        fields = read_header(BytesIO(content)).get("__metadata__", {})
        with torch.device("cpu"):  # not on the default device
            tensors = load(content)
        whole = FIELD not in fields or _matches(sorted(tensors.items()), fields)
    except OSError as error:
        raise ZooError(f"{file}: {error.strerror}") from None
    except Exception as error:  # as above
        raise ZooError(f"{file}: cannot be read: {one_line(error)}") from None
    if not whole:
        raise ZooError(f"{file}: {DAMAGED}")
    return tensors, fields


def _matches(tensors: Iterable[tuple[str, Tensor]], fields: Mapping[str, str]) -> bool:
    return fields[FIELD] == _checksum(tensors, {name: value for name, value in fields.items() if name != FIELD})


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file by name, each through a separate memory mapping that is freed with it."""
    with safe_open(file, "pt") as stored:
        names = sorted(stored.keys())
    for name in names:
        with safe_open(file, "pt") as stored:
            yield name, stored.get_tensor(name)


def _checksum(tensors: Iterable[tuple[str, Tensor]], fields: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, and of the metadata unless it is that of a weights file."""
    digest = hashlib.sha256(b"" if fields == PLAIN else json.dumps(fields, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

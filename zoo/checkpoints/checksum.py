"""The checksum in the metadata of our safetensors files. Files without one, such as those of upstream projects, are accepted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from zoo.checkpoints.plain import one_line
from zoo.errors import ZooError

FIELD = "zoo.sha256"


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
        expected = fields.pop(FIELD, None)
        if expected is None or expected == _checksum(_read(file), fields):
            return
    except Exception as error:  # a damaged header can make safetensors raise anything
        raise ZooError(f"{file}: cannot be read: {one_line(error)}") from None
    raise ZooError(f"{file}: damaged: its tensors do not match its {FIELD}")


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

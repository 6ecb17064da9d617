"""Tensors in a folder, in any of the supported files; names and shapes are checked before any is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import ZooError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored:
    """Tensors by name, read one at a time. Files are memory-mapped, so nothing is copied before it is used."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device
        self.shapes: dict[str, list[int]] = {}
        self.files: dict[str, Path] = {}
        self._sources: dict[str, Any] = {}

    def add(self, file: Path, stack: ExitStack) -> None:
        source = _open(file, stack, self._device)
        for name, shape in _shapes(file, source).items():
            if name in self.files:
                raise ZooError(f"{file}: tensor '{name}' is also in {self.files[name]}")
            self.shapes[name], self.files[name], self._sources[name] = shape, file, source

    def drop(self, pattern: str) -> list[str]:
        """Drop the tensors whose names match this regular expression at the start; returns their names."""
        dropped = [name for name in self.shapes if re.match(pattern, name)]
        for name in dropped:
            del self.shapes[name], self.files[name], self._sources[name]
        return dropped

    def read(self, name: str, dtype: torch.dtype | None = None, *, transient: bool = False) -> Tensor:
        """Read a tensor as `dtype` (default: as stored).

        A tensor kept as stored is a view of the file. Others are read through a mapping of their own, whose pages are freed with
        it, so that a model takes no more memory than its parameters.

        Args:
            transient: the caller only copies from the result, or compares it.
        """
        tensor = self._mapped(self._sources[name], name)
        if tensor.is_cpu and (transient or dtype not in (None, tensor.dtype)):
            with ExitStack() as stack:
                tensor = self._mapped(_open(self.files[name], stack, self._device), name)
        return tensor.to(dtype)

    def _mapped(self, source: Any, name: str) -> Tensor:
        try:
            tensor: Tensor = source[name] if isinstance(source, dict) else source.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ZooError(f"{self.files[name]}: tensor '{name}' cannot be read: {error}") from None
        return tensor

    def check(self, folder: Path, wanted: Mapping[str, list[int]], owner: str) -> None:
        """Raise ZooError unless exactly these tensors, with these shapes, are stored."""
        if missing := sorted(wanted.keys() - self.shapes.keys()):
            raise ZooError(f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all of {owner})")
        if unexpected := sorted(self.shapes.keys() - wanted.keys()):
            name = unexpected[0]
            raise ZooError(f"{self.files[name]}: tensor '{name}' is not part of {owner} ({len(unexpected)} in all)")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise ZooError(f"{self.files[name]}: tensor '{name}' is {self.shapes[name]}, the config wants {shape}")


@contextmanager
def open_folder(folder: Path, device: str | torch.device = "cpu") -> Iterator[Stored]:
    """Open the tensors of model.safetensors, of the shards its index names, or of the only *.safetensors, *.pth or *.bin file.

    Raises:
        ZooError: no such file, a damaged file, or an index that does not match its shards; names the file.
    """
    stored = Stored(device)
    with ExitStack() as stack:
        if (folder / INDEX).is_file():
            _add_shards(stored, folder, stack)
        else:
            stored.add(_only_file(folder), stack)
        yield stored


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZooError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ZooError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ZooError(f"{file}: want an object of fields")
    return content


def _only_file(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    for pattern in ("*.safetensors", "*.pth", "*.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise ZooError(f"{folder}: {len(found)} files {pattern} without {INDEX}; want {WEIGHTS}, or the index of the shards")
    raise ZooError(f"{folder / WEIGHTS}: cannot be read: no such file, nor {INDEX}, nor one *.pth or *.bin")


def _add_shards(stored: Stored, folder: Path, stack: ExitStack) -> None:
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ZooError(f"{index}: weight_map: want the shard of every tensor")
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or "\\" in shard:
            raise ZooError(f"{index}: weight_map: '{shard}' lies outside the folder; want the name of a file beside the index")
        if not (folder / shard).is_file():
            lost = min(name for name, place in places.items() if place == shard)
            raise ZooError(f"{folder / shard}: the shard is missing; {index.name} puts '{lost}' there")
        stored.add(folder / shard, stack)
    for name, shard in places.items():
        if stored.files.get(name) != folder / shard:
            raise ZooError(f"{folder / shard}: tensor '{name}' is missing, though {index.name} puts it there")


def _open(file: Path, stack: ExitStack, device: str | torch.device) -> Any:
    """Map the file; returns the handle of `safe_open`, or tensors by name."""
    if file.suffix != ".safetensors":
        return _read_zip(file, device)
    try:
        return stack.enter_context(safe_open(file, framework="pt", device=str(device)))
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{file}: cannot be read: {error}") from None


def _shapes(file: Path, source: Any) -> dict[str, list[int]]:
    if isinstance(source, dict):
        return {name: list(tensor.shape) for name, tensor in source.items()}
    try:
        return {name: source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{file}: cannot be read: {error}") from None


def _read_zip(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise ZooError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ZooError(f"{file}: want tensors by name, at the top level or under 'model'")
    return tensors

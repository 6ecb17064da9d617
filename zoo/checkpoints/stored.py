"""Tensors in a folder, in any of the supported files; names, shapes and dtypes are checked before any is read."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from zoo.checkpoints.checksum import read_header, verify
from zoo.checkpoints.plain import one_line
from zoo.dtypes import DTYPES
from zoo.errors import ZooError, counted
from zoo.files import as_path

T = TypeVar("T")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
LARGEST_JSON = 64 * 2**20
"""Maximum size of a JSON file in bytes; an index of a million tensors takes about as much."""
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored:
    """Tensors by name, read one at a time. Files are memory-mapped, so nothing is copied before it is used."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        """Dtype of each tensor; one that is not supported is given by the name that the file uses."""
        self.files: dict[str, Path] = {}
        self._sources: dict[str, Any] = {}
        self._starts: dict[str, int] = {}

    def add(self, file: Path, stack: ExitStack) -> None:
        source = _open(file, stack, self._device)
        for name, (shape, dtype, start) in _entries(file, source).items():
            if name in self.files:
                raise ZooError(f"{file}: tensor '{name}' is also in {self.files[name]}")
            self.shapes[name], self.dtypes[name], self.files[name], self._sources[name] = shape, dtype, file, source
            self._starts[name] = start

    def drop(self, pattern: str) -> list[str]:
        """Drop the tensors whose names match this regular expression at the start; returns their names."""
        matches = re.compile(pattern).match
        dropped = [name for name in self.shapes if matches(name)]
        for name in dropped:
            del self.shapes[name], self.dtypes[name], self.files[name], self._sources[name]
        return dropped

    def main_dtype(self) -> torch.dtype:
        """Return the dtype of the largest tensor."""
        dtype = self.dtypes[max(self.shapes, key=lambda name: prod(self.shapes[name]))] if self.shapes else "no tensor"
        if isinstance(dtype, str):
            raise ZooError(f"dtype: {dtype} is not supported; allowed: {', '.join(DTYPES)}")
        return dtype

    def rounded(self, names: Iterable[str], dtype: torch.dtype | None) -> list[str]:
        """Return those of these tensors that may lose bits when they are read as `dtype`."""
        stored = ((name, self.dtypes[name]) for name in names)
        return [
            name for name, own in stored if isinstance(own, torch.dtype) and dtype not in (None, own) and own.itemsize >= dtype.itemsize
        ]

    def read(self, name: str, dtype: torch.dtype | None = None, *, transient: bool = False) -> Tensor:
        """Read a tensor as `dtype` (default: as stored).

        A tensor kept as stored is a view of the file. Others are read through a separate memory mapping, whose pages are freed
        with it, so that a model takes no more memory than its parameters.

        Args:
            transient: the caller only copies from the result, or compares it.
        Raises:
            ZooError: the tensor cannot be read, or holds NaN or infinity.
        """
        tensor = self._mapped(self._sources[name], name)
        if tensor.is_cpu and (transient or dtype not in (None, tensor.dtype)):
            with ExitStack() as stack:
                tensor = self._mapped(_open(self.files[name], stack, self._device), name)
        if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise ZooError(f"{self.files[name]}: tensor '{name}' holds NaN or infinity; the file is damaged")
        return tensor.to(dtype)

    def join(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """Read tensors of one shape as `dtype` (default: as the first is stored), concatenated along their first dimension.

        They are read past the memory mapping, which would keep thousands of small ones in memory twice.

        Raises:
            ZooError: as `read`.
        """
        rows, *rest = self.shapes[names[0]]
        first = self.dtypes[names[0]]
        assert isinstance(first, torch.dtype)
        joined = torch.empty(rows * len(names), *rest, dtype=dtype or first, device=self._device)
        with ExitStack() as stack:
            opened = {file: stack.enter_context(file.open("rb")) for file in {self.files[name] for name in names}}
            for name, part in zip(names, joined.split(rows), strict=True):
                source = self._sources[name]
                part.copy_(self._mapped(source, name) if isinstance(source, dict) else self._copied(opened[self.files[name]], name))
        if not all(bound.isfinite() for bound in torch.aminmax(joined)):
            bad = next(name for name, part in zip(names, joined.split(rows), strict=True) if not part.isfinite().all())
            raise ZooError(f"{self.files[bad]}: tensor '{bad}' holds NaN or infinity; the file is damaged")
        return joined

    def _mapped(self, source: Any, name: str) -> Tensor:
        read: Callable[[], Tensor] = lambda: source[name] if isinstance(source, dict) else source.get_tensor(name)  # noqa: E731
        return _reading(f"{self.files[name]}: tensor '{name}'", read)

    def _copied(self, file: BinaryIO, name: str) -> Tensor:
        dtype = self.dtypes[name]
        assert isinstance(dtype, torch.dtype)
        tensor = torch.empty(self.shapes[name], dtype=dtype)
        file.seek(self._starts[name])
        if file.readinto(tensor.view(torch.uint8).numpy().data) < tensor.nbytes:  # type: ignore[attr-defined]
            raise ZooError(f"{self.files[name]}: tensor '{name}' cannot be read: the file ends before it")
        return tensor

    def check(self, folder: Path, wanted: Mapping[str, list[int]], owner: str) -> None:
        """Raise ZooError unless exactly these tensors are stored, with these shapes, floating-point dtypes, and their checksum."""
        if missing := sorted(wanted.keys() - self.shapes.keys()):
            raise ZooError(f"{folder}: tensor '{missing[0]}' is missing ({counted(len(missing), 'tensor')} of {owner} in all)")
        if unexpected := sorted(self.shapes.keys() - wanted.keys()):
            name = unexpected[0]
            raise ZooError(f"{self.files[name]}: tensor '{name}' is not part of {owner} ({len(unexpected)} in all)")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise ZooError(f"{self.files[name]}: tensor '{name}' is {self.shapes[name]}, the config wants {shape}")
            if isinstance(self.dtypes[name], str):
                raise ZooError(f"{self.files[name]}: tensor '{name}' is {self.dtypes[name]}; allowed: {', '.join(DTYPES)}")
        for file in sorted(set(self.files.values())):
            if file.suffix == ".safetensors":
                verify(file)


def kept_dtype(dtype: torch.dtype | None, wide: bool) -> torch.dtype | None:
    """Return the dtype to read a tensor as (None: as stored), in a model of `dtype`: a `wide` one is float32 or wider."""
    return torch.promote_types(dtype, torch.float32) if wide and dtype is not None else dtype


@contextmanager
def open_folder(folder: Path, device: str | torch.device = "cpu") -> Iterator[Stored]:
    """Open the tensors of the first of these that exists: model.safetensors, the shards that its index names,
    pytorch_model.bin, its shards, the only *.safetensors, *.pth or *.bin file.

    Raises:
        ZooError: no such file, a damaged file, an index that does not match its shards, or two sets of weights; names the file.
    """
    refuse_adapter(folder)
    stored = Stored(device)
    with ExitStack() as stack:
        if (index := _index(folder)) is not None:
            _add_shards(stored, index, stack)
        else:
            stored.add(_only_file(folder), stack)
        yield stored


def has_weights(folder: Path) -> bool:
    """Return whether there is any file in a folder that may hold weights."""
    return any(file.suffix in (".safetensors", ".pth", ".bin") for file in folder.iterdir())


def refuse_adapter(folder: Path) -> None:
    """Raise ZooError if a folder holds an adapter, which changes what its weights compute."""
    if (folder / ADAPTER).is_file():
        raise ZooError(f"{folder / ADAPTER}: adapters are not loaded; merge it into the weights, or remove it")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ZooError."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ZooError(f"{file}: {file.stat().st_size} bytes; want at most {LARGEST_JSON}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZooError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{file}: not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ZooError(f"{file}: want an object of fields")
    return content


def _index(folder: Path) -> Path | None:
    """Return the index to read, if there is one and no single file comes first. Raises ZooError if both hold weights."""
    for whole, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / index).is_file():
            if not (folder / whole).is_file():
                return folder / index
            shards = set(_places(folder / index).values()) - {whole}
            if any((folder / shard).is_file() for shard in shards):
                raise ZooError(f"{folder}: holds both {whole} and the shards of {index}; remove the weights that are out of date")
        if (folder / whole).is_file():
            return None
    return None


def _only_file(folder: Path) -> Path:
    for name in (WEIGHTS, PICKLED):
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*.safetensors", "*.pth", "*.bin"):
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            raise ZooError(f"{folder}: {len(found)} {pattern} files without {INDEX}; want {WEIGHTS}, or the index of the shards")
    raise ZooError(f"{folder / WEIGHTS}: cannot be read: no such file, nor {INDEX}, nor one *.pth or *.bin")


def _places(index: Path) -> dict[str, str]:
    """Read the shard of every tensor from an index."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ZooError(f"{index}: weight_map: want the shard of every tensor")
    for shard in set(places.values()):
        as_path(shard, f"{index}: weight_map")
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise ZooError(f"{index}: weight_map: {shard!r} lies outside the folder; want the name of a file beside the index")
    return places


def _add_shards(stored: Stored, index: Path, stack: ExitStack) -> None:
    places = _places(index)
    files = {shard: index.parent / shard for shard in sorted(set(places.values()))}
    for shard, file in files.items():
        if not file.is_file():
            lost = min(name for name, place in places.items() if place == shard)
            raise ZooError(f"{file}: the shard is missing; {index.name} puts '{lost}' there")
        stored.add(file, stack)
    for name, shard in places.items():
        if stored.files.get(name) is not files[shard]:
            raise ZooError(f"{files[shard]}: tensor '{name}' is missing, though {index.name} puts it there")


def _reading(label: str, read: Callable[[], T]) -> T:
    """Return `read()`, or raise a ZooError that starts with `label`: a damaged file can make the readers raise anything."""
    try:
        return read()
    except (KeyboardInterrupt, SystemExit, ZooError):
        raise
    except BaseException as error:  # panics of safetensors are not an Exception
        raise ZooError(f"{label} cannot be read: {one_line(error)}") from None


def _open(file: Path, stack: ExitStack, device: str | torch.device) -> Any:
    """Memory-map the file; returns the handle of `safe_open`, or tensors by name."""
    if file.suffix != ".safetensors":
        return _read_pickled(file, device)
    return _reading(f"{file}:", lambda: stack.enter_context(safe_open(file, framework="pt", device=str(device))))


def _entries(file: Path, source: Any) -> dict[str, tuple[list[int], torch.dtype | str, int]]:
    """Return the shape and dtype of every tensor in a file, and where it starts in a safetensors file, which has been opened before."""
    if isinstance(source, dict):
        return {name: (list(x.shape), x.dtype if x.dtype in DTYPES.values() else str(x.dtype), 0) for name, x in source.items()}
    with file.open("rb") as opened:
        header, end = read_header(opened), opened.tell()
    header.pop("__metadata__", None)
    return {
        name: (entry["shape"], SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]), end + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _read_pickled(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        if opened.read(9)[8:] == b"{":
            raise ZooError(f"{file}: its content is safetensors; rename it to end in .safetensors")
    mapped = zipfile.is_zipfile(file)  # files of torch before 1.6 are not, and cannot be mapped
    try:
        content: Any = _reading(f"{file}:", lambda: torch.load(file, map_location=device, weights_only=True, mmap=mapped))
    except ZooError as error:
        if "Weights only load failed" not in str(error):
            raise
        # torch advises to run the code
        raise ZooError(f"{file}: cannot be read: it is damaged, or holds objects that could run code; want tensors by name") from None
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and type(x) is Tensor for name, x in tensors.items()):
        raise ZooError(f"{file}: want tensors by name, at the top level or under 'model'")
    return tensors

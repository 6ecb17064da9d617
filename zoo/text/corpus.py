"""A corpus as token ids: text files, JSON lines, Parquet or datasets become train.npy and test.npy, next to a copy of the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import yaml

from zoo.checkpoints.companions import GENERATION, has_tokenizer, read_companions, write_companions
from zoo.checkpoints.plain import one_line
from zoo.errors import ZooError, counted
from zoo.files import is_scratch, new_folder
from zoo.registry import nearest
from zoo.text.tokenizers import ByteTokenizer, FolderTokenizer

END_OF_BYTES = 0
"""Token that ends a document of bytes, and an answer of a model that is trained on them."""
SUMMARY = "data.yaml"
DATASETS = "hf://datasets/"


class Corpus(NamedTuple):
    """Size of a tokenized corpus. It is written to data.yaml."""

    vocab: int
    """Size of the vocabulary."""
    end: int
    """Token that ends every document."""
    documents: int
    characters: int
    train: int
    """Tokens, those that end documents included."""
    test: int


def tokenize(
    sources: Sequence[Path | str],
    out: Path,
    *,
    tokenizer: Path | None = None,
    field: str = "text",
    split: str = "train",
    held_out: float = 0.01,
    advance: Callable[[int], None] = lambda documents: None,
) -> Corpus:
    """Write the documents of `sources` to the new folder `out`.

    A hash of a document decides whether it is held out, so equal documents are in the same split.

    Args:
        sources: files, or folders of files: .jsonl and .parquet hold a document in each row, any other file is one document.
            "hf://datasets/owner/name" is a dataset of the Hugging Face hub, with "/subset" and "@revision" where it has several.
        tokenizer: folder of a tokenizer; default: bytes.
        field: field of a row that holds the text.
        split: split of datasets that is read.
        held_out: share of the documents in test.npy.
        advance: called after each document with the number of documents done.
    Raises:
        ZooError: a file that cannot be read, a row without the field, no document in a split, or a tokenizer without an end token.
    """
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise ZooError(f"{tokenizer}: holds no tokenizer, such as tokenizer.json")
    encode = FolderTokenizer(tokenizer, 2**32) if tokenizer is not None else ByteTokenizer()
    size, end = (encode.size, encode.stop[:1]) if isinstance(encode, FolderTokenizer) else (256, (END_OF_BYTES,))
    if end and end[0] >= size:
        raise ZooError(f"{tokenizer}: the end token is {end[0]}; the tokenizer has {counted(size, 'token')}")
    if not end:
        raise ZooError(f"{tokenizer}: names no end token, which documents need; set eos_token in tokenizer_config.json")
    dtype = np.dtype(np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.uint32)
    counts, done, characters = {"train": 0, "test": 0}, 0, 0
    found = _listed(sources)  # before there is an output, which may be in a source
    with new_folder(out) as folder:
        with (folder / "train.raw").open("wb") as train, (folder / "test.raw").open("wb") as test:
            files: dict[str, IO[bytes]] = {"train": train, "test": test}
            for done, text in enumerate(_documents(found, field, split), 1):
                ids = [*encode.encode(text, special=False), *end]
                share = int.from_bytes(hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:4], "big") / 2**32
                part = "test" if share < held_out else "train"
                files[part].write(np.asarray(ids, dtype).tobytes())
                counts[part] += len(ids)
                characters += len(text)
                advance(done)
        if done < 2:
            raise ZooError(f"{out}: {counted(done, 'document')}; want at least 2, of which some are held out")
        for part, count in counts.items():
            if not count:
                held = counted(done, "document")
                raise ZooError(f"{out}: {part}.npy would hold none of {held}; change --held-out, which is {held_out}, or add documents")
            _with_header(folder / f"{part}.raw", folder / f"{part}.npy", dtype, count)
        corpus = Corpus(size, end[0], done, characters, **counts)
        (folder / SUMMARY).write_text(yaml.safe_dump(corpus._asdict(), sort_keys=False), encoding="utf-8")
        companions = {} if tokenizer is None else read_companions(tokenizer)
        if GENERATION not in companions:
            companions[GENERATION] = json.dumps({"eos_token_id": end[0]}).encode() + b"\n"
        write_companions(companions, folder)
    return corpus


def documents(sources: Sequence[Path | str], field: str, split: str = "train") -> Iterator[str]:
    """Yield the text of every document. Raises ZooError."""
    return _documents(_listed(sources), field, split)


def _listed(sources: Iterable[Path | str]) -> list[Path | str]:
    """Return the files of all sources, and the addresses of datasets. Raises ZooError: a folder that cannot be read."""
    found = list[Path | str]()
    for source in sources:
        folder = Path(source)
        found += [str(source)] if str(source).startswith(DATASETS) else _files(folder) if folder.is_dir() else [folder]
    return found


def _files(source: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, also of linked ones, in the order of their paths. Raises ZooError."""

    def refuse(error: OSError) -> None:
        raise ZooError(f"{error.filename}: cannot be read: {error.strerror}")

    found, seen = list[Path](), set[str]()
    for folder, folders, names in os.walk(source, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_scratch(Path(name)))
        if (real := os.path.realpath(folder)) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names if not is_scratch(Path(name))]
    return sorted(found)


def _documents(listed: Iterable[Path | str], field: str, split: str) -> Iterator[str]:
    for source in listed:
        if isinstance(source, str):
            yield from _dataset(source, field, split)
        elif source.suffix == ".jsonl":
            yield from _rows(source, field)
        elif source.suffix == ".parquet":
            yield from _columns(source, field)
        else:
            yield _read(source)


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:  # without a byte-order mark, with its line ends
            return text.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"{file}: cannot be read as text: {error}") from None


def _rows(file: Path, field: str) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row: Any = json.loads(line) if line.strip() else {field: ""}
                except (ValueError, RecursionError) as error:
                    raise ZooError(f"{file}: line {number}: not JSON: {error}") from None
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise ZooError(f"{file}: line {number}: no text under '{field}'")
                if line.strip():
                    yield row[field]
    except ZooError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"{file}: cannot be read as JSON lines: {error}") from None


def _columns(file: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ZooError(f"{file}: Parquet needs pip install pyarrow") from None
    try:
        rows = parquet.ParquetFile(file)
        if field not in rows.schema_arrow.names:
            raise ZooError(f"{file}: no column '{field}'; {nearest(field, rows.schema_arrow.names)}")
        texts = (text for batch in rows.iter_batches(columns=[field]) for text in batch.column(0).to_pylist())
        nulls = 0
        for number, text in enumerate(texts, 1):
            if isinstance(text, str):
                yield text
            elif text is None:
                nulls += 1
            else:
                raise ZooError(f"{file}: row {number}: no text under '{field}'")
        if nulls:
            warnings.warn(f"{file}: {counted(nulls, 'row')} with null under '{field}' left out", stacklevel=2)
    except ZooError:
        raise
    except (OSError, ValueError) as error:
        raise ZooError(f"{file}: cannot be read as Parquet: {error}") from None


def _dataset(address: str, field: str, split: str) -> Iterator[str]:
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@(.+))?", address.removeprefix(DATASETS))
    if found is None:
        raise ZooError(f"{address}: want {DATASETS}OWNER/NAME, with /SUBSET and @REVISION if needed")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ZooError(f"{address}: needs pip install datasets") from None
    name, subset, revision = found.groups()
    try:
        rows = load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # whichever exception the network, the hub or the library raises
        raise ZooError(f"{address}: cannot be loaded: {one_line(error)}") from None
    if field not in rows.column_names:
        raise ZooError(f"{address}: no column '{field}'; {nearest(field, rows.column_names)}")
    for number, text in enumerate(rows[field], 1):
        if not isinstance(text, str):
            raise ZooError(f"{address}: row {number}: no text under '{field}'")
        yield text


def _with_header(raw: Path, file: Path, dtype: np.dtype[Any], count: int) -> None:
    """Turn plain numbers into a .npy file."""
    with raw.open("rb") as source, file.open("wb") as target:
        np.lib.format.write_array_header_1_0(
            target, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        )
        shutil.copyfileobj(source, target)
    raw.unlink()

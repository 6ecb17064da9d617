"""Files and folders are written atomically, and nothing that exists is overwritten."""

from __future__ import annotations

import glob
import os
import re
import reprlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zoo.errors import ZooError
from zoo.signals import before_exit

SCRATCH = ".zoo-unfinished-"
"""Part of the names of temporary files and folders that no other name has."""
_unfinished: set[Path] = set()
"""Temporary files and folders that this process is writing."""


def remove_unfinished() -> None:
    """Remove what this process is writing and has not finished. For a process that is about to end."""
    for scratch in tuple(_unfinished):
        shutil.rmtree(scratch, ignore_errors=True) if scratch.is_dir() else scratch.unlink(missing_ok=True)


before_exit.append(remove_unfinished)


def as_path(value: Any, name: str = "path") -> Path:
    """Return `value` as a path. Raises a ZooError that starts with `name` unless it is text or a path that a system can have."""
    if not isinstance(value, str | os.PathLike):
        raise ZooError(f"{name}: {reprlib.repr(value)}; want text or a pathlib.Path")
    path = Path(value)
    try:
        fits = len(os.fsencode(path)) <= 4095 and all(len(os.fsencode(part)) <= 255 for part in path.parts)
    except UnicodeEncodeError:  # a lone surrogate
        fits = False
    if not fits or "\0" in str(path):
        raise ZooError(f"{name}: {str(path)[:80]!r} is not a path: too long, or with a character that no path can have")
    return path


def refuse_existing(path: Path) -> None:
    """Raise a ZooError unless a new folder can be written at `path`, where at most an empty folder may exist.

    Leftovers of a killed process in an otherwise empty folder are ignored.
    """
    with _one_line(path):
        target = _target(path)
        if target.exists() and not (target.is_dir() and all(map(is_scratch, target.iterdir()))):
            raise ZooError(f"{path}: already exists; nothing is overwritten, choose another folder")
        place = next(folder for folder in (target, *target.parents) if folder.exists())
        if not place.is_dir():
            raise ZooError(f"{path}: {place} is a file; want a folder")
        if not os.access(place, os.W_OK):
            raise ZooError(f"{path}: cannot write in {place}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the `with` block succeeds, and is removed if it fails.

    An empty folder that is already there stays the same folder, so `path` may be a symbolic link, a mount point or ".".
    """
    refuse_existing(path)
    with _one_line(path):
        target = _target(path)
        exists = target.is_dir()
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch(target / target.name if exists else target)
        scratch.mkdir()
        _unfinished.add(scratch)
        try:
            yield scratch
            mode = scratch.stat().st_mode & 0o666  # some libraries write files that only their owner can read
            for file in scratch.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
            if exists:
                for entry in sorted(scratch.iterdir()):
                    os.replace(entry, target / entry.name)
            else:
                os.replace(scratch, target)
        except ZooError as error:  # the user does not know the scratch folder
            if str(scratch) not in str(error):
                raise
            raise ZooError(str(error).replace(str(scratch), str(path))) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            _unfinished.discard(scratch)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` if the `with` block succeeds."""
    scratch = _scratch(path)
    with _one_line(path):
        _unfinished.add(scratch)
        try:
            scratch.touch()
            mode = scratch.stat().st_mode & 0o666
            yield scratch
            scratch.chmod(mode)  # some libraries write files that only their owner can read
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
            _unfinished.discard(scratch)


def remove_scratch(path: Path) -> None:
    """Remove what a killed process left while it wrote the folder `path`, or files in it. The caller must be its only writer."""
    target = _target(path)
    beside = [entry for entry in target.parent.glob(f".{glob.escape(_stem(target))}{SCRATCH}*") if is_scratch(entry)]
    for entry in [*filter(is_scratch, target.iterdir()), *beside]:
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _scratch(path: Path) -> Path:
    """Return the name of a temporary file or folder that becomes `path`. Raises ZooError: the path ends in no name."""
    if not path.name or path.name == "..":
        raise ZooError(f"path: '{path}' ends in no name; want one that ends in the name of a file or folder")
    return path.with_name(f".{_stem(path)}{SCRATCH}{secrets.token_hex(4)}")


def _stem(path: Path) -> str:
    """Return the beginning of a path's name that its temporary names contain: these have at most 255 bytes."""
    stem = path.name
    while len(os.fsencode(stem)) > 255 - len(f".{SCRATCH}") - 8:
        stem = stem[:-1]
    return stem


def is_scratch(path: Path) -> bool:
    """Return whether a path has a name that `_scratch` gives."""
    return re.fullmatch(rf"\..+{re.escape(SCRATCH)}[0-9a-f]{{8}}", path.name) is not None


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn a file-system error, such as a full disk, into a one-line ZooError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ZooError(f"{path}: cannot be written: {' '.join(reason.split())}") from error


def _target(path: Path) -> Path:
    """Return the absolute path without symbolic links."""
    target = Path(os.path.realpath(path))
    if any(part.is_symlink() for part in (target, *target.parents)):
        raise ZooError(f"{path}: a loop of symbolic links")
    return target

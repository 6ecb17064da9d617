"""Read damaged files within bounds of time and memory, and find those that are not refused in one line."""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

import zoo
from tests.zoo.damage import damaged
from tests.zoo.readable import Kind

SECONDS, BYTES = 20, 2 * 2**30
"""CPU time, and memory."""
LONGEST = 2100
"""Characters of an error."""


class HungError(BaseException):
    """Reading takes more than `SECONDS`."""


@contextmanager
def bounded() -> Iterator[list[str]]:
    """Bound the time of the block, and the memory that it may add; yields a list of the bounds that it exceeded."""
    exceeded: list[str] = []

    def stop(*_: Any) -> None:
        exceeded.append(f"takes more than {SECONDS} s")
        raise HungError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, old = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, old[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # if no Python code runs, or it waits
    try:
        yield exceeded
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def stderr_to(file: int) -> Iterator[None]:
    """Send standard error to a file, also that of libraries."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return a is None or (a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b))
    return b is None or (len(a) == len(b) and all(map(torch.equal, a, b)))


def outcome(kind: Kind, place: Path, whole: Any) -> str:
    """Read a damaged folder; returns the problem, or "" if there is none."""
    problem = ""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with bounded() as exceeded, stderr_to(said.fileno()), redirect_stderr(said), redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                content = kind.read(place)
            except zoo.ZooError as error:
                lines = str(error).splitlines()
                if len(lines) != 1 or len(lines[0]) > LONGEST:
                    problem = f"{len(lines)} lines, {len(str(error))} characters: {str(error)[:200]}"
            except BaseException as error:
                problem = f"{type(error).__module__}.{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            else:
                problem = "" if not kind.ours or same(content, whole) else "accepted"
        said.seek(0)
        lines = said.read().splitlines()
    if exceeded:
        return exceeded[0]
    return problem or (f"prints {len(lines)} lines: {lines[0][:200]}" if len(lines) > 1 else "")


def rewrite(file: Path, content: bytes) -> None:
    """Write a file that may be a hard link to a whole one."""
    file.unlink()
    file.write_bytes(content)


def try_all(folder: Path, kind: Kind, count: int, seed: int) -> list[str]:
    """Read `count` damaged files. Returns the problems."""
    problems, chance = [], random.Random(f"{kind.folder} {kind.file} {seed}")
    content, whole = (folder / kind.folder / kind.file).read_bytes(), kind.read(folder / kind.folder) if kind.ours else None
    place, marker = folder / f"try-{kind.folder}", folder / "executed"
    for number in range(count):
        shutil.copytree(folder / kind.folder, place, copy_function=os.link)
        rewrite(place / kind.file, damaged(content, kind.form, marker, chance))
        found = outcome(kind, place, whole)
        shutil.rmtree(place)
        if marker.exists():
            marker.rmdir()
            found = f"code was executed; {found}"
        if found:
            problems.append(f"{kind.folder}/{kind.file} {number}: {found}")
    return problems


def find(kinds: Sequence[Kind], folder: Path, count: int, seed: int) -> list[str]:
    """Read `count` damaged files, evenly over the kinds, whose whole files are in `folder`. Returns the problems."""
    each, more = divmod(count, len(kinds))
    order = random.Random(seed).sample(kinds, len(kinds))
    return [problem for n, kind in enumerate(order) for problem in try_all(folder, kind, each + (n < more), seed)]

"""Prepare what a GPU machine without a package registry lacks, in build/gpu: python -m benchmarks.gpu.pack

    build/gpu/site           packages for PYTHONPATH, and the commit of this tree
    build/gpu/tensorrt.0 ... TensorRT-RTX, compressed and cut into pieces, which the stage `tensorrt` joins

With the repository, each of them stays below 64 MiB, the most that may be sent at once.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import metadata
from pathlib import Path

import click

from benchmarks.gpu.sheet import PACKED
from benchmarks.measure import HERE, console
from zoo.files import replacing

ROOT, FOLDER = HERE.parent, PACKED.parent
MIB = 1 << 20
LIMIT = 64 * MIB
SPARE = 2 * MIB
PYTHON = "3.12"
PACKAGES = ("annotated-types", "catalogue", "fla-core", "pydantic", "pydantic_core", "typing-inspection", "typing_extensions")
TENSORRT = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
LOADER = "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"


def install(packages: Iterable[str], folder: Path) -> None:
    """Install packages for the other machine's Python into a folder, in the versions of constraints.txt."""
    platforms = [word for version in ("2_28", "2_27", "2_17") for word in ("--platform", f"manylinux_{version}_x86_64")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", "--upgrade"]
    command += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*command, "--target", str(folder), *packages], check=True)


def pack_site() -> None:
    """Write build/gpu/site. Its record of sleep-zoo lets `importlib.metadata` find the version of this tree."""
    shutil.rmtree(PACKED, ignore_errors=True)
    install(PACKAGES, PACKED)
    about = metadata("sleep-zoo")
    record = PACKED / f"sleep_zoo-{about['Version']}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sleep-zoo\nVersion: {about['Version']}\n", encoding="utf-8")
    (PACKED / "commit").write_text(git("rev-parse", "--short", "HEAD") + (" + changes" if git("status", "--porcelain") else ""), "utf-8")


def pack_tensorrt(piece: int) -> None:
    """Write build/gpu/tensorrt.0, .1, ... of at most `piece` bytes. Compressing takes minutes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tensorrt"
        install(TENSORRT, folder)
        (folder / "tensorrt_rtx").mkdir()
        (folder / "tensorrt_rtx" / "__init__.py").write_text(LOADER, encoding="utf-8")
        cut(folder, FOLDER, piece)


def cut(package: Path, folder: Path, piece: int) -> None:
    """Compress the folder `package` and cut it into files of at most `piece` bytes: its name with .0, .1, ... in `folder`."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 128 * MIB}]
    with tempfile.TemporaryFile() as file:
        with lzma.open(file, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
            archive.add(package, arcname=package.name)
        file.seek(0)
        for number, part in enumerate(iter(lambda: file.read(piece), b"")):
            with replacing(folder / f"{package.name}.{number}") as new:
                new.write_bytes(part)


def unpack_tensorrt(folder: Path = FOLDER) -> Path:
    """Join the pieces in `folder`, if all are there and were not joined before. Returns the folder to put on PYTHONPATH, if it exists."""
    pieces = sorted(folder.glob("tensorrt.*"), key=lambda file: int(file.suffix[1:]))
    if pieces and not (folder / "tensorrt").exists():
        # without all pieces the folder is missing, and the stage says so
        with suppress(EOFError, lzma.LZMAError, tarfile.TarError), tempfile.TemporaryDirectory(dir=folder) as scratch:
            whole = Path(scratch) / "whole"
            with whole.open("wb") as stream:
                stream.writelines(piece.read_bytes() for piece in pieces)
            with tarfile.open(whole, "r:xz") as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "tensorrt").rename(folder / "tensorrt")
    return folder / "tensorrt"


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def repository() -> int:
    """Return the bytes of the files that travel with the repository."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink())


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check(base: int, packages: Iterable[Path]) -> None:
    """Print the sizes. Raises click.ClickException if one does not fit beside the repository."""
    for package in packages:
        total = base + size(package)
        console.print(f"{package}: {size(package) / MIB:.1f} MiB, with the repository {total / MIB:.1f} MiB")
        if total > LIMIT:
            raise click.ClickException(f"{package}: {total / MIB:.1f} MiB with the repository; at most {LIMIT / MIB:.0f} may be sent")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = repository()
    pack_site()
    check(base, [PACKED])
    if not any(FOLDER.glob("tensorrt.*")):
        console.print("compressing TensorRT-RTX takes some minutes")
        pack_tensorrt(LIMIT - SPARE - base)
    check(base, sorted(FOLDER.glob("tensorrt.*")))


if __name__ == "__main__":
    main()

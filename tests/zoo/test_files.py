"""New folders and replaced files: complete or absent, whichever way the path is written, with the user's umask."""

import os
import re
import resource
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

import zoo
from zoo.files import is_scratch, new_folder, refuse_existing, remove_scratch, replacing


def write(path):
    with new_folder(path) as folder:
        (folder / "b").mkdir()
        (folder / "b" / "c").write_text("c")
        (folder / "a").write_text("a")


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_written_by_any_of_its_names(tmp_path, monkeypatch):
    for name in ("empty", "real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    monkeypatch.chdir(tmp_path / "here")
    for path in ("new", "a/b/new", "empty", "link", "dangling"):
        write(tmp_path / path)
        assert tree(tmp_path / path) == ["a", "b", "b/c"]
    write(type(tmp_path)("."))
    assert sorted(os.listdir(".")) == ["a", "b"]  # the folder that the process is in, not a new one of its name
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "later" / "a").read_text() == "a"
    for path in ("new", "link", "dangling", "here"):
        with pytest.raises(zoo.ZooError, match="already exists"):
            write(tmp_path / path)


def test_nothing_is_left_after_a_failure(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with suppress(KeyError), new_folder(tmp_path / name) as folder:
            (folder / "a").write_text("a")
            raise KeyError
    assert tree(tmp_path) == ["empty"]
    (tmp_path / "file").write_text("old")
    with suppress(KeyError), replacing(tmp_path / "file") as file:
        file.write_text("new")
        raise KeyError
    assert (tmp_path / "file").read_text() == "old"
    assert tree(tmp_path) == ["empty", "file"]


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
        zoo.save(zoo.create("gdn4", d_model=32), tmp_path / "model")
        with replacing(tmp_path / "file") as file:
            file.write_text("x")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


@contextmanager
def little_room(size):
    """Files may not grow beyond `size` bytes: writing fails as on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line(tmp_path):
    model = zoo.create("gdn4", d_model=32)
    with little_room(1000):
        with pytest.raises(zoo.ZooError, match=r"/model/model\.safetensors: cannot be written: [^\n]*too large[^\n]*$"):
            zoo.save(model, tmp_path / "model")
        with pytest.raises(zoo.ZooError, match=r"file: cannot be written: File too large$"), replacing(tmp_path / "file") as file:
            file.write_bytes(bytes(2000))
    assert tree(tmp_path) == []


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("file", "file/new", "loop", "loop/new", "x" * 300):
        with pytest.raises(zoo.ZooError, match=r"^[^\n]+$"):
            refuse_existing(tmp_path / path)
    with pytest.raises(zoo.ZooError, match=r"file/new/run: .*/file is a file; want a folder$"):
        refuse_existing(tmp_path / "file" / "new" / "run")
    with pytest.raises(zoo.ZooError, match="cannot"), replacing(tmp_path / "none" / "file") as file:
        file.write_text("x")


@pytest.mark.parametrize("name", [".venv-3.11", ".notes.2024", ".cache-deadbeef", ".out-0123abcd", ".git", "notes"])
def test_files_of_the_user_are_neither_ignored_nor_removed(tmp_path, name):
    """Whatever their names: only a folder that holds nothing else is empty."""
    out = tmp_path / "out"
    for place in (out / name, tmp_path / name):
        place.mkdir(parents=True)
        (place / "mine").write_text("mine")
    with pytest.raises(zoo.ZooError, match="already exists"):
        refuse_existing(out)
    remove_scratch(out)
    assert (out / name / "mine").read_text() == (tmp_path / name / "mine").read_text() == "mine"


def test_what_a_killed_process_left_is_removed(tmp_path):
    out = tmp_path / "o[u]t"
    code = "import os, sys, pathlib; from zoo.files import new_folder, replacing; out = pathlib.Path(sys.argv[1])\n"
    killed = " os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", f"{code}with new_folder(out):{killed}", str(out)], check=False)
    out.mkdir()
    code += f"with new_folder(out), new_folder(out.parent / out.name.upper()), replacing(out / 'file'):{killed}"
    subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    left = {entry.name for entry in (*out.iterdir(), *tmp_path.iterdir())} - {"o[u]t"}
    assert len(left) == 4
    refuse_existing(out)
    remove_scratch(out)
    assert not list(out.iterdir())
    assert [entry.name.startswith(".O[U]T") for entry in tmp_path.iterdir() if entry != out] == [True]  # another folder's


def test_threads_may_write_the_same_file(tmp_path):
    def write(n):
        with replacing(tmp_path / "file") as scratch:
            scratch.write_text(f"{n}" * 1000)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(200)))
    content = (tmp_path / "file").read_text()
    assert len(set(re.findall(r"\d", content))) <= 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("path", ["", ".", "/", ".."])
def test_a_path_without_a_name_is_refused(path):
    model = zoo.create("gdn4", layers="gdn", d_model=16, d_ff=16)
    with pytest.raises(zoo.ZooError, match=r"^path: .* ends in no name; want [^\n]*$"):
        zoo.Session(model).save(path)


@pytest.mark.parametrize("name", ["x" * 231, "x" * 255, "é" * 127, "x" + "é" * 127])
def test_a_name_of_any_legal_length_is_written(tmp_path, name):
    with replacing(tmp_path / name) as file:
        assert is_scratch(file)
        file.write_text("new")
    write(tmp_path / "folders" / name)
    assert tree(tmp_path / "folders" / name) == ["a", "b", "b/c"]
    left = tmp_path / "folders" / file.name
    left.mkdir()
    remove_scratch(tmp_path / "folders" / name)
    assert not left.exists()

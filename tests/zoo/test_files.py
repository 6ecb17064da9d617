"""New folders and replaced files: complete or absent, whichever way the path is written, with the user's umask."""

import os
import resource
import signal
import stat
from contextlib import contextmanager, suppress

import pytest

import zoo
from zoo.files import new_folder, refuse_existing, replacing


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

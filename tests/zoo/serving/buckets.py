"""Object stores for tests, as filesystems of fsspec: one in a folder for several processes, and one that fails or takes turns."""

import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from threading import Condition, current_thread

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from tests.zoo.serving.disk import complete


class Bucket(LocalFileSystem):
    """Objects in a folder, which appear whole or not at all, and listings that are cached as those of s3fs and gcsfs are."""

    protocol = "bucket"

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        place = Path(self._strip_protocol(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.parents[1] / f".{uuid.uuid4()}"
        scratch.write_bytes(value)
        os.replace(scratch, place)

    def put_file(self, path1, path2, callback=None, **kwargs):
        self.pipe_file(path2, Path(path1).read_bytes())

    def ls(self, path, detail=False, **kwargs):
        if path not in self.dircache:
            found = self.dircache[path] = super().ls(path, detail, **kwargs)
            return found
        return self.dircache[path]


class Faulty(MemoryFileSystem):
    """Every operation calls `Faulty.before` and `Faulty.after`; both may raise."""

    protocol = "faulty"
    store, pseudo_dirs = {}, [""]
    before = after = staticmethod(lambda: None)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in ("ls", "find", "cat_file", "pipe_file", "put_file", "get_file", "rm_file"):
            return found

        def operation(*args, **options):
            Faulty.before()
            try:
                return found(*args, **options)
            finally:
                Faulty.after()

        return operation


for kind in (Bucket, Faulty):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


class Failing:
    """The n-th operation fails and all after it, before anything happens or only afterwards, until the store is healed."""

    def __init__(self, monkeypatch, *, afterwards):
        self.left = None
        monkeypatch.setattr(Faulty, "after" if afterwards else "before", staticmethod(self._step))

    def fail_at(self, n):
        self.left = n

    def heal(self):
        self.left = None

    def _step(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no connection")  # each filesystem has errors of its own


class Turns:
    """Lets threads do one operation at a time, each when it is its turn; a thread that has ended gives its turns away."""

    def __init__(self, order):
        self._order, self._changed, self._ended = list(order), Condition(), set()

    def before(self):
        me = current_thread().name
        with self._changed:
            assert self._changed.wait_for(lambda: not self._order or self._order[0] == me, 60)

    def after(self):
        with self._changed:
            self._order = self._order[1:]
            self._skip()

    def end(self):
        with self._changed:
            self._ended.add(current_thread().name)
            self._skip()

    def _skip(self):
        while self._order and self._order[0] in self._ended:
            del self._order[0]
        self._changed.notify_all()


def whole(folder):
    """Fail if an object of a store in a folder is torn."""
    for file in Path(folder).glob("*/*.safetensors"):
        with suppress(FileNotFoundError):
            load_file(file)
    for file in Path(folder).glob("*/*.jsonl"):
        assert re.fullmatch(r"\d{12}-[0-9a-f]{16}-\d{12}(\.whole)?\.jsonl", file.name)
        assert all(map(complete, file.read_bytes().splitlines(keepends=True)))

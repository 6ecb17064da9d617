"""`zoo serve` in a process of its own."""

import contextlib
import os
import re
import resource
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[3]


class Process:
    """A server of the model in the subfolder `model` of a folder.

    Args:
        files: maximum number of its open files.
    """

    def __init__(self, folder, *options, files=None):
        self._log = folder / "log"
        command = [sys.executable, "-m", "zoo", "serve", str(folder / "model"), "--name", "model", "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            self.child = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
        if files is not None:
            resource.prlimit(self.child.pid, resource.RLIMIT_NOFILE, (files, files))  # before it counts them
        while not (match := re.search(r"http://127\.0\.0\.1:\d+", self.log)):
            assert self.child.poll() is None, self.log
            time.sleep(0.1)
        self.url = match[0]

    @property
    def log(self):
        return self._log.read_text()

    @property
    def memory(self):
        """Bytes of memory that it occupies."""
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.child.pid}/status").read_text())[1]) * 1024

    @property
    def files(self):
        """Number of its open files."""
        return len(os.listdir(f"/proc/{self.child.pid}/fd"))

    def metric(self, name):
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            return float(re.search(rf"^{name} (.*)$", response.read().decode(), re.MULTILINE)[1])


@contextlib.contextmanager
def process(*args, **options):
    server = Process(*args, **options)
    try:
        yield server
    finally:
        server.child.kill()
        server.child.wait()

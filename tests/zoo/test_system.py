"""Other operating systems: import, inference and training where modules of Unix and Linux are missing."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
import torch
import zoo
from zoo.training.config import TrainConfig
from zoo.training.loop import train

folder = sys.argv[1]
model = zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=16, d_ff=16, vocab_size=256)
prompt = torch.arange(20)[None]
tokens = torch.cat(list(zoo.Session(model).generate(prompt, 3)))
zoo.save(model, folder + "/model")
loaded = zoo.load(folder + "/model")
session = zoo.Session(loaded)
assert torch.equal(tokens, torch.cat(list(session.generate(prompt, 3))))
session.save(folder + "/stream")
assert zoo.Session(loaded).load(folder + "/stream").stats().tokens == 22
with zoo.SessionPool(model, 2) as pool:
    assert torch.equal(tokens, torch.cat(list(pool.open().generate(prompt, 3))))
config = TrainConfig(
    model="gdn4-sleep2", overrides=dict(layers="attn gdn", d_model=16, d_ff=16, window=5),
    task=dict(name="cycle", nodes=5, hops=2), steps=2, batch_size=4, eval_sequences=8,
)
lines = []
train(config, folder + "/run", report=lines.append)
assert lines[-1]["step"] == 2 and "memory" not in lines[-1], lines
import zoo.training.ablation, zoo.training.workers, zoo.system, zoo.cli, zoo.serving.app, zoo.export.runtime
assert zoo.system.cores() == os.cpu_count()
"""


def test_without_the_modules_of_unix(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


THREADS = """
import os, time
import torch
import zoo
from zoo.system import release_threads

def threads(once=0):
    # the number of threads, as soon as it is `once`
    started = time.monotonic()
    while (count := len(os.listdir("/proc/self/task"))) != once and once and time.monotonic() - started < 5:
        time.sleep(0.01)
    return count

torch.set_num_threads(3)
values, alone = torch.rand(1000, 1000), threads()
first = values.exp()
assert threads() == alone + 2
release_threads()
assert threads(alone) == alone
assert torch.equal(values.exp(), first)

model = zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=512, vocab_size=20_000)
ids = torch.randint(20_000, (1, 20), generator=torch.Generator().manual_seed(0))
session = zoo.Session(model)
tokens = [*session.generate(ids, 20), *session.generate(ids, 20)]
with zoo.SessionPool(model, 1) as pool:
    stream = pool.open()
    assert threads(alone + 1) == alone + 1
    for expected in tokens[:20], tokens[20:]:
        assert list(stream.generate(ids, 20)) == expected
        assert threads() == alone + 3
        assert threads(alone + 1) == alone + 1
"""


@pytest.mark.skipif(not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="torch uses another OpenMP library")
def test_threads_that_have_nothing_to_do_end():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


HEAPS = """
import ctypes, sys, tempfile, threading
from zoo.system import share_heaps

share_heaps()
barrier = threading.Barrier(8)

def allocate():
    barrier.wait()
    kept = [bytes(100_000) for _ in range(100)]
    barrier.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps are those of glibc")
def test_threads_share_two_heaps(tmp_path):
    """As glibc itself reports."""
    subprocess.run([sys.executable, "-c", HEAPS, tmp_path / "heaps.xml"], check=True, timeout=120)
    assert (tmp_path / "heaps.xml").read_text().count("<heap nr=") == 2

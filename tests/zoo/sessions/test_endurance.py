"""Long streams, and killed processes. The full sizes run in `make test-all`."""

import gc
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo

PIECES = [1, 2, 5, 3, 7, 1, 1, 4] * 8
PHASES = ("feed", "sleep", "save")


def model(evict):
    return zoo.create(f"gdn4-sleep2-{evict}", layers="attn gdn", d_model=32, d_ff=16, vocab_size=11)


def live_bytes():
    gc.collect()
    return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


PARTS = 12


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("fed", [1_500, pytest.param(200_000, marks=pytest.mark.extended)])
@pytest.mark.parametrize("evict", ["hard24", "slide24"])
def test_memory_is_flat(evict, fed):
    stream = zoo.Session(model(evict))
    described = zoo.describe(stream.model)
    generator = torch.Generator().manual_seed(0)
    place, held, resident = [], [], []
    for part in range(PARTS):
        while stream.stats().tokens < fed * (part + 1) / PARTS:
            stream.feed(torch.randint(0, 11, (1, 1 + part % 3 * 30), generator=generator))
        assert stream.stats().state_bytes == described.state_bytes
        stream.sleep()
        place.append(stream.stats().tokens)
        held.append(live_bytes())
        resident.append(resident_bytes())
    assert len(set(held[1:])) == 1  # equal in every byte of tensors, at the same point of the window
    if fed >= 200_000:  # in a short stream, the allocator dominates
        slope = np.polyfit(place[3:], resident[3:], 1)[0]
        assert slope < 1, f"{slope:.2f} bytes per token"


def program():
    """Yield the steps of the killed process: feed, sleep at every third piece, and save after each."""
    ids = torch.randint(0, 11, (1, sum(PIECES)), generator=torch.Generator().manual_seed(0))
    for i, piece in enumerate(ids.split(PIECES, dim=1)):
        yield from [("feed", piece), ("save", None)]
        if i % 3 == 2:
            yield from [("sleep", None), ("save", None)]


def run(stream, steps, file=None, phase=None):
    """Yield the logits of each step, if any, and the numbers of tokens and sleeps afterwards."""
    for name, piece in steps:
        if phase is not None:
            phase[0] = PHASES.index(name)
        logits = None
        if name == "feed":
            logits = stream.feed(piece)
        elif name == "sleep":
            stream.sleep()
        elif file is not None:
            stream.save(file)
        yield logits, (stream.stats().tokens, stream.stats().sleeps)


def _stop_in(child, wanted, phase, chance):
    """Stop the process at a random point of a phase; a busy machine may let it run on into the next one meanwhile."""
    while True:
        while phase[0] != wanted:
            pass
        time.sleep(0.002 * chance.random())
        os.kill(child, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        if phase[0] == wanted:
            return
        os.kill(child, signal.SIGCONT)


def kill_and_replay(folder, kills):
    """Fork processes and kill them; `test_killed` runs this in a process of its own."""
    sleeping, file, steps, chance = model("slide24"), folder / "stream", list(program()), random.Random(0)
    unbroken = list(run(zoo.Session(sleeping), steps))
    reached, whole, phase = [0, 0, 0], 0, mmap.mmap(-1, 1)
    for kill in range(kills):
        phase[0] = len(PHASES)
        child = os.fork()
        if child == 0:
            for _ in range(1000):
                list(run(zoo.Session(sleeping), steps, file, phase))
            os._exit(1)
        time.sleep(0.2 * chance.random())
        _stop_in(child, kill % 3, phase, chance)
        reached[phase[0]] += 1
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        if file.exists():
            stream = zoo.Session(sleeping).load(file)
            now = stream.stats().tokens, stream.stats().sleeps
            at = max(i for i, (_, reached_then) in enumerate(unbroken) if reached_then == now) + 1
            for (got, _), (want, _) in zip(run(stream, steps[at:]), unbroken[at:], strict=True):
                assert (got is None) if want is None else torch.equal(got, want)
            whole += 1
    print(whole, *reached)


@pytest.mark.parametrize("kills", [9, pytest.param(50, marks=pytest.mark.extended)])
def test_killed(tmp_path, kills):
    """After kill -9 at random points, every file is complete, and the stream continues from it bit for bit."""
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.zoo.sessions.test_endurance import *; "
        f"kill_and_replay(Path({str(tmp_path)!r}), {kills})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, *reached = map(int, done.stdout.split())
    assert whole >= 0.8 * kills
    assert sum(reached) == kills
    assert min(reached) >= 1  # some in feed, some in sleep, some in save

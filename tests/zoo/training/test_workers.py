"""The pool of training workers: what is trained, which failures are reported, and that no worker outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import zoo
from tests.zoo.training.tiny import tiny
from zoo.signals import StoppedError
from zoo.system import lock
from zoo.training import workers
from zoo.training.loop import train
from zoo.training.workers import Job, train_all

ROOT = Path(__file__).parents[3]

ENDLESS = """
import sys
from pathlib import Path
from tests.zoo.training.tiny import tiny
from zoo.training.workers import Job, train_all

if __name__ == "__main__":
    out = Path(sys.argv[1])
    train_all({i: Job(tiny(steps=10**6, log_every=1, seed=i), out / str(i)) for i in range(2)}, processes=2)
"""


def note(folder):
    (folder / "after.txt").write_text("the run is finished" if (folder / "results.json").exists() else "too early")


def test_every_job_is_trained_and_failures_are_named(tmp_path, monkeypatch, capfd):
    """The first one only when the process that was training it has ended."""
    monkeypatch.setattr(workers, "LOOK_AGAIN", 0.1)
    with pytest.raises(StoppedError):
        train(tiny(), tmp_path / "busy", report=lambda metrics: os.kill(os.getpid(), signal.SIGTERM))
    lines = (tmp_path / "busy" / "metrics.jsonl").read_text()
    other = (tmp_path / "busy" / "train.yaml").open()
    assert lock(other)
    threading.Thread(target=lambda: (wait_for((tmp_path / "other" / "results.json").exists), time.sleep(0.5), other.close())).start()
    jobs = {
        "busy": Job(tiny(), tmp_path / "busy"),
        "good": Job(tiny(), tmp_path / "good", after=note),
        "wild": Job(tiny(lr=1e30, clip=1e30, steps=9), tmp_path / "wild", after=note),
        "other": Job(tiny(seed=1), tmp_path / "other"),
    }
    failed = train_all(jobs, processes=1)
    assert list(failed) == ["wild"]
    assert "try a lower lr" in failed["wild"]
    assert (tmp_path / "busy" / "metrics.jsonl").read_text().startswith(lines)
    assert (tmp_path / "busy" / "results.json").stat().st_mtime > (tmp_path / "other" / "results.json").stat().st_mtime
    assert capfd.readouterr().err.count("busy: another process is training it; waiting") == 1
    assert (tmp_path / "good" / "after.txt").read_text() == "the run is finished"
    assert not (tmp_path / "wild" / "after.txt").exists()
    assert zoo.load(tmp_path / "other").config.name == zoo.load(tmp_path / "good").config.name


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "endless.py", tmp_path], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: all((tmp_path / str(i) / "metrics.jsonl").exists() for i in range(2)))
    children = [pid for pid, above in parents().items() if above == parent.pid]
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not {*children} & parents().keys())
    assert all(list((tmp_path / str(i)).glob("checkpoints/[0-9]*")) for i in range(2))


def parents():
    """Return the parent of every process that is not a zombie."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def wait_for(happened, seconds=300):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)

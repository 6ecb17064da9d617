"""Train in child processes that are killed, then resume in this one. Prints a JSON object: losses and a hash of the weights by case.

Runs in a fresh process, because a process with threads, such as a test runner, must not fork.
"""

import hashlib
import json
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import torch

import zoo
import zoo.training.parallel
from tests.zoo.training.tiny import tiny
from zoo.training.loop import StoppedError, train

CONFIG = {"steps": 16, "accumulate": 2, "muon_lr": 0.02, "checkpoint_every": 3}


def send(number, step, metrics):
    """Send this process a signal at `step`."""
    if metrics["step"] == step:
        os.kill(os.getpid(), number)


def kill_while_saving(step, metrics):
    if metrics["step"] == step:
        zoo.training.parallel.save_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def child(config, out, report):
    """Train in a child process. Returns 0 if the run stopped by itself, else minus the signal that killed it."""
    if (pid := os.fork()) == 0:
        try:
            train(config, out, report=report)
        except StoppedError:
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(out):
    digest = hashlib.sha256()
    for name, tensor in zoo.load(out).state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    return {"steps": [m["step"] for m in lines], "losses": [m["loss"] for m in lines], "weights": digest.hexdigest(), "left": left}


def interrupt(folder, dtype, count):
    config = tiny(**CONFIG, dtype=dtype)
    chosen = random.Random(0).sample(range(1, config.steps), count)
    cases = {f"{number.name} at {step}": partial(send, number, step) for number in (signal.SIGTERM, signal.SIGKILL) for step in chosen}
    cases["killed while saving"] = partial(kill_while_saving, 7)
    ends = {name: child(config, folder / name, report) for name, report in cases.items()}
    assert all(end == (0 if name.startswith("SIGTERM") else -signal.SIGKILL) for name, end in ends.items()), ends
    train(config, folder / "uninterrupted")
    for name in cases:
        train(config, folder / name)
    return {name: outcome(folder / name) for name in ["uninterrupted", *cases]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts = dict(argument.split("=") for argument in sys.argv[2:])
    print(json.dumps({dtype: interrupt(Path(sys.argv[1]) / dtype, dtype, int(count)) for dtype, count in counts.items()}))

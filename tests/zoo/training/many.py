"""The runs of test_parallel.py, in the two processes that torchrun starts.

torchrun --nproc-per-node 2 many.py FOLDER curves|killed
"""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from tests.zoo.training.tiny import TINY, tiny
from zoo.tasks import Task, tasks
from zoo.training.loop import StoppedError, train
from zoo.training.parallel import join

BASE = {
    **TINY,
    "task": {"name": "cycle", "nodes": 6, "hops": 2},
    "steps": 6,
    "batch_size": 6,
    "lr": 0.01,
    "eval_sequences": 9,
    "checkpoint_every": 4,
}
MUON = {"muon_lr": 0.02, "weight_decay": 0.1, "lr_scale": {"blocks.0.*": 0.5}, "frozen": ["head.*"]}
CASES = {
    "adamw": {},
    "muon": MUON,
    "accumulate": {**MUON, "accumulate": 3, "recompute": "chunks"},
    "bfloat16": {**MUON, "dtype": "bfloat16"},
    "a process without answers": {
        "overrides": {**BASE["overrides"], "sleep_on": "every"},
        "task": {"name": "half-asked", "nodes": 6, "hops": 2},
        "lr": 1e-3,
    },
    # only a sleep reads the positions, and gradients do not reach it
    "positions asleep": {"overrides": {**BASE["overrides"], "learned_positions": "asleep"}, "backward_chunks": 1},
    # the processes have different numbers of answers, and a gate gets no gradient
    "depo": {
        "overrides": {**BASE["overrides"], "window": 12, "exit": {"loop": 0}},
        "task": {"name": "depo", "nodes": 12, "hops": 2, "questions": 2},
        "recompute": "passes",
        "batch_size": 5,
    },
}


class HalfAsked(tasks.get("cycle")):
    """A cycle whose training batches ask nothing in their second half, which is the share of the second of two processes."""

    name = "half-asked"

    def batch(self, seed, step, size, split="train"):
        batch = super().batch(seed, step, size, split)
        batch.loss_mask[size // 2 :] &= split == "test"
        return batch


def half_asked():
    """Register the task in this process."""
    tasks.register("half-asked", HalfAsked)


STOP = 3  # the checkpoint is then written after step 4

# Muon orthogonalises in bfloat16, where the last bit of a gradient, which depends on the order of sums, can change an update by
# 1/256. After 20 steps, the losses differ by 1e-3, also between accumulate 1 and 3 in a single process.
in_float32 = (torch.Tensor, "bfloat16", torch.Tensor.float)


def plan(case, how):
    return tiny(**{**BASE, **CASES[case], "parallel": how})


@contextmanager
def at_step(step, act):
    """Inside the block, call `act` in this process when the batch of `step` is made."""
    batch = Task.batch

    def acting(task, seed, now, size, split="train"):
        if (now, split) == (step, "train"):
            act()
        return batch(task, seed, now, size, split)

    Task.batch = acting
    yield
    Task.batch = batch


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def stopped(out, how, *, here=True):
    """Train until SIGTERM arrives in this process, or in another one."""
    with at_step(STOP, terminate) if here else nullcontext():
        try:
            train(plan("muon", how), out)
        except StoppedError as error:
            return str(error)


def curves(folder, rank):
    for how in ("ddp", "fsdp"):
        for case in CASES:
            train(plan(case, how), folder / how / case)
        train(plan("muon", how), folder / how / "begun alone")
        said = stopped(folder / how / "begun together", how, here=rank == 1)
        (folder / how / f"stopped-{rank}").write_text(said)


def killed(folder, rank):
    with at_step(STOP, lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 1 else nullcontext():
        train(plan("adamw", "ddp"), folder / "killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    half_asked()
    setattr(*in_float32)
    with join("cpu") as team:
        {"curves": curves, "killed": killed}[sys.argv[2]](Path(sys.argv[1]), team.rank)

"""What torchrun starts twice: the runs of test_parallel.py in one process group.

torchrun --nproc-per-node 2 many.py FOLDER curves|killed
"""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from zoo.config import validate
from zoo.tasks import Task
from zoo.training.config import TrainConfig
from zoo.training.loop import StoppedError, train

BASE = {
    "model": "gdn4-sleep2-hard6",
    "overrides": {"layers": "attn gdn", "d_model": 16, "d_ff": 16},
    "task": {"name": "cycle", "nodes": 6, "hops": 2},
    "steps": 20,
    "batch_size": 6,
    "lr": 0.01,
    "log_every": 1,
    "eval_sequences": 9,
    "checkpoint_every": 8,
}
MUON = {"muon_lr": 0.02, "weight_decay": 0.1, "lr_scale": {"blocks.0.*": 0.5}, "frozen": ["head.*"]}
CASES = {
    "adamw": {},
    "muon": MUON,
    "accumulate": {**MUON, "accumulate": 3, "recompute": "chunks"},
    "bfloat16": {**MUON, "dtype": "bfloat16"},
    # answers differ in number, and a gate has no gradient
    "depo": {
        "overrides": {**BASE["overrides"], "window": 12, "exit": {"loop": 0}},
        "task": {"name": "depo", "nodes": 12, "hops": 2, "questions": 2},
        "recompute": "passes",
        "batch_size": 5,
    },
}
STOP = 7  # so the checkpoint is that of step 8

# Muon makes updates orthogonal in bfloat16, where a last bit of a gradient, as another order of sums leaves it, may be one in
# 256 of an update: after 20 steps the losses differ by 1e-3, in one process with accumulate 1 and 3 just as well.
in_float32 = (torch.Tensor, "bfloat16", torch.Tensor.float)


def plan(case, how):
    return validate(TrainConfig, {**BASE, **CASES[case], "parallel": how}, "test")


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
    """Train until SIGTERM comes to this process, or to another one."""
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
    dist.init_process_group("gloo")
    setattr(*in_float32)
    {"curves": curves, "killed": killed}[sys.argv[2]](Path(sys.argv[1]), dist.get_rank())
    dist.destroy_process_group()

"""Training runs as tasks of a Ray cluster: `zoo ablate PLAN --out FOLDER --on ray`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.signals import StoppedError, deferred
from zoo.training.workers import BUSY, LOOK_AGAIN, Job, Name, finish

try:
    import ray
except ImportError:
    raise ZooError("ray: not installed; pip install 'sleep-zoo[integrations]'") from None


def train_all(jobs: Mapping[Name, Job], processes: int | None = None) -> dict[Name, str]:
    """Do what `zoo.training.workers.train_all` does, in a Ray cluster: that of RAY_ADDRESS, else one of this machine.

    A job takes a GPU, or a core in a cluster without GPUs. Its folder must be on storage that all machines share. A job whose
    machine fails starts again, from its last checkpoint.

    Args:
        processes: jobs at once; default: as many as the cluster has room for.
    """
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, include_dashboard=False)
    needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    do = ray.remote(max_retries=3, **needs)(_do)
    pending = dict.fromkeys(jobs, 0.0)  # with the time before which a job is not tried again
    running: dict[Any, Name] = {}
    failed: dict[Name, str] = {}
    try:
        with deferred() as stop_requested:
            while (pending or running) and not stop_requested():
                for name in [name for name, when in pending.items() if when <= time.monotonic()]:
                    if processes is None or len(running) < processes:
                        del pending[name]
                        running[do.remote(jobs[name]._replace(folder=jobs[name].folder.absolute()))] = name
                ended, _ = ray.wait(list(running), timeout=0.5) if running else ([], [])
                for task in ended:
                    name, outcome = running.pop(task), _outcome(task)
                    if outcome == BUSY:
                        pending[name] = time.monotonic() + LOOK_AGAIN
                        continue
                    print(f"{name}: {outcome or 'done'}", flush=True)
                    if outcome is not None:
                        failed[name] = outcome
                if not ended and not running:
                    time.sleep(0.5)  # until a job that another process is training is tried again
            if number := stop_requested():
                for task in running:
                    ray.cancel(task)  # as Ctrl-C: the run writes a checkpoint
                if running:
                    ray.wait(list(running), num_returns=len(running))
                raise StoppedError("stopped; the same command resumes", number)
    finally:
        if own:
            ray.shutdown()
    return failed


def _do(job: Job) -> str | None:
    torch.set_num_threads(1)
    with suppress(StoppedError):
        return finish(job)
    return "stopped"


def _outcome(task: Any) -> str | None:
    try:
        outcome: str | None = ray.get(task)
    except ray.exceptions.RayError as error:
        return f"its task failed: {' '.join(str(error).split())}"
    return outcome

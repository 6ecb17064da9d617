"""Run the GPU benchmarks, stage by stage, and print their tables.

    python -m benchmarks.gpu [STAGE ...] [--seconds 470] [--dry]

Each stage is a process with a time limit; at the limit it is stopped, and what it has written is kept. As long as there is
time, and in a later call, what is missing runs: first the stages that never began, then the unfinished ones. `--dry` rehearses on the
CPU at tiny sizes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

from benchmarks.gpu.pack import unpack_tensorrt
from benchmarks.gpu.sheet import POISONED, read, table
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.stamp import stamp
from benchmarks.measure import HERE, console

GRACE = 10  # seconds in which a stage may write a checkpoint once its time is over
WORTH_STARTING = 15  # seconds
REHEARSAL = 3  # times the limit, on a CPU


def results(dry: bool) -> Path:
    """Return the folder of the results: one for each GPU, and one for rehearsals, which never overwrite results."""
    if dry:
        return HERE.parent / "build" / "gpu" / "dry"
    if not torch.cuda.is_available():
        raise click.ClickException("torch finds no GPU; DRY=1 rehearses on the CPU")
    return HERE / "results" / "gpu" / re.sub(r"\W+", "-", torch.cuda.get_device_name())


def pending(stages: list[str], folder: Path) -> list[str]:
    """Return the stages that are not complete, those that never began first, and `figure2a`, which takes any time, last."""
    contents = {name: read(folder / f"{name}.json") for name in stages}
    todo = (name for name in stages if not (contents[name] or {}).get("complete"))
    return sorted(todo, key=lambda name: (name == "figure2a", contents[name] is not None))


def run(name: str, folder: Path, dry: bool, seconds: float) -> str:
    """Run a stage for at most `seconds`, again in a new process where it lost the CUDA context. Returns how it ended."""
    file, deadline = folder / f"{name}.json", time.monotonic() + seconds
    command = [sys.executable, "-m", "benchmarks.gpu.stage", name, str(file), *["--dry"] * dry]
    if dry:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    else:
        paths = [os.environ.get("PYTHONPATH", ""), str(unpack_tensorrt()) if name == "tensorrt" else ""]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (folder / f"{name}.log").open("ab") as log:
        while True:
            process = subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return f"stopped at its limit of {seconds:.0f} s"
            finally:
                stop(process)
            if process.returncode != POISONED:
                return "done" if process.returncode == 0 else f"failed with status {process.returncode}; see {log.name}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@click.command()
@click.argument("stages", nargs=-1, type=click.Choice(list(STAGES)))
@click.option("--seconds", default=470.0, show_default=True, help="Seconds for all stages together.")
@click.option("--dry", is_flag=True, help="Rehearse on the CPU at tiny sizes.")
def main(stages: tuple[str, ...], seconds: float, dry: bool) -> None:
    folder, deadline = results(dry), time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in STAGES if name in (stages or STAGES)]
    todo = pending(chosen, folder)
    for name in chosen:
        if name not in todo:
            console.print(f"[dim]{name}: measured already[/]")
    if not dry:
        stamp(folder)  # the configurations that an earlier call verified
    failed: set[str] = set()
    while todo:
        for name in todo:
            left = deadline - time.monotonic()
            if left < WORTH_STARTING:
                console.print(f"{name}: not started, {left:.0f} s are left")
                continue
            started = time.monotonic()
            ended = run(name, folder, dry, min(STAGES[name].seconds * (REHEARSAL if dry else 1), left - GRACE / 2))
            console.print(f"[bold]{name}[/]: {ended} after {time.monotonic() - started:.0f} s")
            if ended.startswith("failed"):
                failed.add(name)
            if not dry and name == "kernels":
                stamp(folder)
        again = deadline - time.monotonic() >= WORTH_STARTING
        todo = [name for name in pending(chosen, folder) if name not in failed] if again else []
    for name in chosen:
        if content := read(folder / f"{name}.json"):
            console.print(table(content))


if __name__ == "__main__":
    main()

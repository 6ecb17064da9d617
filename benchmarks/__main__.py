"""Run the CPU benchmarks, each in a separate process, and update docs/performance.md.

    python -m benchmarks [BENCHMARK ... | --all] [--against GIT_REF]

`--against` runs the benchmarks of this tree and of that commit in two processes, which take turns after every measurement, and prints
the speedup of this tree: the median and the quartiles of five rounds. The exit status is 2 if one of the two could not run.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
from rich.table import Table

from benchmarks.measure import HERE, OURS, SCALE, console, quartiles, spread
from benchmarks.report import write

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "kernels": ("--rounds", "3"),
    "prefill": (),
    "decode": (),
    "families": (),
    "experts": (),
    "genai": (),
    "hotspots": (),
    "prediction_cost": (),
    "sleep": (),
    "export": (),
    "exported_streams": (),
    "opening": (),
    "integers": (),
    "scaling": (),
    "throughput": (),
    "training_memory": (),
    "training_step": (),
    "loading": (),
    "startup": (),
    "operations": (),
    "token_latency": (),
    "server_load": (),
    "server_prefix": (),
    "server_sessions": (),
    "server_sleep": (),
}

LONG = {"export", "families", "integers", "server_prefix", "server_sessions", "server_sleep", "training_step"}
"""Benchmarks that only run if they are named, or all are: the others take half an hour."""


def start(benchmark: str, tree: Path, results: Path, turns: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    """Start the process of one benchmark."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "ZOO_BENCHMARK_RESULTS": str(results)}
    environment |= {"ZOO_BENCHMARK_TURNS": " ".join(map(str, turns))} if turns else {}
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *BENCHMARKS[benchmark]]
    return subprocess.Popen(command, cwd=tree, env=environment, pass_fds=turns)


def run_all(benchmarks: Sequence[str]) -> list[str]:
    """Run the benchmarks, update the page, and return those that failed."""
    failed = []
    for benchmark in benchmarks:
        started = time.perf_counter()
        if status := start(benchmark, HERE.parent, HERE / "results").wait():
            console.print(f"[bold red]{benchmark}: ended with status {status}[/]")
            failed.append(benchmark)
        console.print(f"[dim]{benchmark}: {time.perf_counter() - started:.0f} s[/]")
    write()
    return failed


def against(benchmarks: Sequence[str], ref: str) -> list[str]:
    """Print the speedup of this tree over the commit `ref`, and return a line for each benchmark that could not run."""
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "other"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", other, ref], cwd=HERE, check=True)
        try:
            shutil.copy(HERE / "measure.py", other / "benchmarks/measure.py")  # the same stopwatch
            for benchmark in benchmarks:
                if not (other / f"benchmarks/{benchmark}.py").exists():
                    problems.append(f"{benchmark}: {ref} has no such benchmark")
                    continue
                places = {HERE.parent: Path(scratch) / "now", other: Path(scratch) / "then"}
                statuses = zip(("this tree", ref), in_turns(benchmark, places), strict=True)
                if failed := [f"{benchmark}: {tree} ended with status {status}" for tree, status in statuses if status]:
                    problems += failed
                    continue
                now, then = (_taken(place / f"{benchmark}.jsonl") for place in places.values())
                cases = sorted(now.keys() & then.keys())
                table = Table("case", f"speedup over {ref}", "this", ref, title=benchmark if cases else f"{benchmark}: no times to compare")
                for case in cases:
                    ratio = quartiles(np.array(then[case]) / np.array(now[case]))
                    table.add_row(case, spread(ratio), *(f"{1e3 * statistics.median(taken[case]):.4g} ms" for taken in (now, then)))
                console.print(table)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=HERE, check=True)
    return problems


def in_turns(benchmark: str, places: Mapping[Path, Path]) -> list[int]:
    """Run a benchmark in several trees at once, one process at a time, and return the exit statuses.

    Args:
        places: folders of the results, by tree.
    """
    processes: list[subprocess.Popen[bytes]] = []
    ends: list[tuple[int, int]] = []
    for tree, results in places.items():
        (reader, give), (taken, writer) = os.pipe(), os.pipe()
        processes.append(start(benchmark, tree, results, (reader, writer)))
        os.close(reader)
        os.close(writer)
        ends.append((give, taken))
    while ends:
        for give, taken in list(ends):
            with suppress(BrokenPipeError):
                os.write(give, b".")
            if not os.read(taken, 1):  # it has ended
                ends.remove((give, taken))
                os.close(give)
                os.close(taken)
    return [process.wait() for process in processes]


def _taken(file: Path) -> dict[str, list[float]]:
    """Return the seconds of our rounds by case; of benchmarks with rounds of their own, the median; of those without a file, nothing."""
    found = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else ()):
        if taken := row["times"].get(row.get("ours", OURS)):
            found[row["case"]] = row.get("taken") or [taken[1] / SCALE.get(row["unit"], 1.0)]
    return found


@click.command()
@click.argument("benchmarks", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--all", "everything", is_flag=True, help="Run those that take long, too.")
@click.option("--against", "ref", metavar="GIT_REF", help="Compare with this commit; write no results.")
def main(benchmarks: tuple[str, ...], everything: bool, ref: str | None) -> None:
    if everything and benchmarks:
        raise click.UsageError(f"--all: names {', '.join(benchmarks)} too; give one or the other")
    chosen = benchmarks or tuple(name for name in BENCHMARKS if everything or name not in LONG)
    if ref is not None:
        for problem in (problems := against(chosen, ref)):
            click.echo(problem, err=True)
        sys.exit(2 if problems else 0)
    if failed := run_all(chosen):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

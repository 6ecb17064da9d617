"""Run the CPU benchmarks, each in a separate process, and update docs/performance.md.

    python -m benchmarks [BENCHMARK ...] [--against GIT_REF]

`--against` alternates between this tree and that commit, each with its own benchmarks, and prints the speedup of this tree.
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
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from benchmarks.measure import HERE, console
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
    "integers": (),
    "scaling": (),
    "throughput": (),
    "training_memory": (),
    "loading": (),
    "startup": (),
    "operations": (),
    "token_latency": (),
    "server_load": (),
}


def run(benchmark: str, tree: Path, results: Path, **environment: str) -> float:
    """Run one benchmark and return its duration in seconds. Raises CalledProcessError."""
    started = time.perf_counter()
    environment |= {**os.environ, "PYTHONPATH": str(tree), "ZOO_BENCHMARK_RESULTS": str(results)}
    subprocess.run([sys.executable, "-m", f"benchmarks.{benchmark}", *BENCHMARKS[benchmark]], check=True, cwd=tree, env=environment)
    return time.perf_counter() - started


def run_all(benchmarks: Sequence[str]) -> list[str]:
    """Run the benchmarks, update the page, and return those that failed."""
    failed = []
    for benchmark in benchmarks:
        try:
            console.print(f"[dim]{benchmark}: {run(benchmark, HERE.parent, HERE / 'results'):.0f} s[/]")
        except subprocess.CalledProcessError as error:
            console.print(f"[bold red]{benchmark}: {error}[/]")
            failed.append(benchmark)
    write()
    return failed


def against(benchmarks: Sequence[str], ref: str, rounds: int) -> None:
    """Print the speedup of this tree over the commit `ref`."""
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "other"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", other, ref], cwd=HERE, check=True)
        try:
            shutil.copy(HERE / "measure.py", other / "benchmarks/measure.py")  # the same stopwatch
            trees = {"this": HERE.parent, ref: other}
            for benchmark in benchmarks:
                for _ in range(rounds):
                    for name, tree in trees.items():
                        run(benchmark, tree, Path(scratch) / name.replace("/", "-"), ZOO_BENCHMARK_ONCE="1")
                now, then = (_medians(Path(scratch) / name.replace("/", "-") / f"{benchmark}.jsonl") for name in trees)
                table = Table("case", f"speedup over {ref}", "this", ref, title=benchmark)
                for case in sorted(now.keys() & then.keys()):
                    table.add_row(case, f"{then[case] / now[case]:.2f}", f"{now[case]:.4g}", f"{then[case]:.4g}")
                console.print(table)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=HERE, check=True)


def _medians(file: Path) -> dict[str, float]:
    """Return our median times by case."""
    seen: dict[str, list[float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seen.setdefault(row["case"], []).append(next(iter(row["times"].values()))[1])
    return {case: statistics.median(values) for case, values in seen.items()}


@click.command()
@click.argument("benchmarks", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--against", "ref", metavar="GIT_REF", help="Compare with this commit; write no results.")
@click.option("--rounds", default=5, show_default=True, help="Alternations with that commit.")
def main(benchmarks: tuple[str, ...], ref: str | None, rounds: int) -> None:
    chosen = benchmarks or tuple(BENCHMARKS)
    if ref is not None:
        against(chosen, ref, rounds)
    elif failed := run_all(chosen):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

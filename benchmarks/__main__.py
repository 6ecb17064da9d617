"""Answer the questions that this machine's CPU can answer, each in a process of its own, and bring docs/performance.md up to date.

    python -m benchmarks [QUESTION ...] [--against GIT_REF]

`--against` runs each question by turns on this tree and on that commit, with the benchmarks of this tree, and prints how much
faster this tree is.
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

QUESTIONS: dict[str, tuple[str, ...]] = {
    "kernels": ("--rounds", "3"),
    "prefill": (),
    "decode": (),
    "genai": (),
    "hotspots": (),
    "prediction_cost": (),
    "sleep": (),
    "export": (),
    "scaling": (),
    "throughput": (),
    "training_memory": (),
    "loading": (),
    "startup": (),
    "operations": (),
    "token_latency": (),
    "server_load": (),
}
TURNS = 2


def run(question: str, tree: Path, results: Path) -> float:
    """Seconds it took. Raises CalledProcessError."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(tree), "ZOO_BENCHMARK_RESULTS": str(results)}
    subprocess.run([sys.executable, "-m", f"benchmarks.{question}", *QUESTIONS[question]], check=True, cwd=tree, env=environment)
    return time.perf_counter() - started


def answer(questions: Sequence[str]) -> list[str]:
    """The questions that failed."""
    failed = []
    for question in questions:
        try:
            console.print(f"[dim]{question}: {run(question, HERE.parent, HERE / 'results'):.0f} s[/]")
        except subprocess.CalledProcessError as error:
            console.print(f"[bold red]{question}: {error}[/]")
            failed.append(question)
    write()
    return failed


def against(questions: Sequence[str], ref: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "other"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", other, ref], cwd=HERE, check=True)
        try:
            shutil.rmtree(other / "benchmarks", ignore_errors=True)
            shutil.copytree(HERE, other / "benchmarks", ignore=shutil.ignore_patterns("results"))
            trees = {"this": HERE.parent, ref: other}
            for question in questions:
                for _ in range(TURNS):
                    for name, tree in trees.items():
                        run(question, tree, Path(scratch) / name.replace("/", "-"))
                now, then = (_medians(Path(scratch) / name.replace("/", "-") / f"{question}.jsonl") for name in trees)
                table = Table("case", f"times as fast as {ref}", "this", ref, title=question)
                for case in now.keys() & then.keys():
                    table.add_row(case, f"{then[case] / now[case]:.2f}", f"{now[case]:.4g}", f"{then[case]:.4g}")
                console.print(table)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=HERE, check=True)


def _medians(file: Path) -> dict[str, float]:
    """Of our own times, by case."""
    seen: dict[str, list[float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seen.setdefault(row["case"], []).append(next(iter(row["times"].values()))[1])
    return {case: statistics.median(values) for case, values in seen.items()}


@click.command()
@click.argument("questions", nargs=-1, type=click.Choice(list(QUESTIONS)))
@click.option("--against", "ref", metavar="GIT_REF", help="Compare with this commit, and write nothing.")
def main(questions: tuple[str, ...], ref: str | None) -> None:
    chosen = questions or tuple(QUESTIONS)
    if ref is not None:
        against(chosen, ref)
    elif failed := answer(chosen):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

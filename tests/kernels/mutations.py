"""Mutation tests of the kernels: breaks one index, mask or sign at a time and runs the tests of that operator.

    python -m tests.kernels.mutations                    a few edits of every kernel
    python -m tests.kernels.mutations ssd --per-kernel 20

Works on a copy of the sources. A survivor is printed with its edit: either the tests have a hole or the edit changes nothing.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parents[2]
SECONDS = 600  # for the tests of one operator; a kernel that hangs is a kernel that is noticed
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add}
BOUNDS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Edit:
    file: Path
    kernel: str
    kind: str
    line: int
    before: str
    after: str
    source: str
    """Return the whole broken file."""


def edits(file: Path) -> Iterator[Edit]:
    """Return every edit of every Triton function in a file."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in function.decorator_list):
            for node in ast.walk(ast.Module(function.body, [])):
                for kind, broken in breakages(node):
                    lines = text.splitlines(keepends=True)
                    span = lines[node.lineno - 1 : node.end_lineno]
                    head, tail = span[0].encode()[: node.col_offset].decode(), span[-1].encode()[node.end_col_offset :].decode()
                    after = f"({ast.unparse(broken)})"
                    lines[node.lineno - 1 : node.end_lineno] = [head + after + tail]
                    yield Edit(file, function.name, kind, node.lineno, ast.unparse(node), after, "".join(lines))


def breakages(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        yield "sign", ast.BinOp(node.left, SIGNS[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in BOUNDS:
        yield "mask", ast.Compare(node.left, [BOUNDS[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
        if any(keyword.arg == "mask" for keyword in node.keywords):
            kept = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
            yield "mask", ast.Call(node.func, node.args, kept)
        shifted = copy.deepcopy(node)
        shifted.args[0] = ast.BinOp(shifted.args[0], ast.Add(), ast.Constant(1))
        yield "index", shifted
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.trans":
        yield "index", node.args[0]


def noticed(edit: Edit, workplace: Path) -> bool:
    """Return whether the tests of the edited operator fail."""
    broken = workplace / edit.file.relative_to(ROOT)
    whole = broken.read_text(encoding="utf-8")
    broken.write_text(edit.source, encoding="utf-8")
    operator = edit.file.parent.name
    texts = {path: path.read_text(encoding="utf-8") for path in (workplace / "tests" / "kernels").glob("test_*.py")}
    tests = sorted(str(path) for path, text in texts.items() if f"kernels.{operator}." in text and "triton" in text)
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not compiled", *tests]
        environment = os.environ | {"PYTHONPATH": str(workplace), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=workplace, env=environment, capture_output=True, timeout=SECONDS).returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        broken.write_text(whole, encoding="utf-8")


@click.command()
@click.argument("operators", nargs=-1)
@click.option("--per-kernel", default=4, help="Edits of each kernel, drawn at random from all, the kinds in turn.")
@click.option("--workers", default=2)
@click.option("--seed", default=0)
def main(operators: tuple[str, ...], per_kernel: int, workers: int, seed: int) -> None:
    files = [file for file in sorted((ROOT / "kernels").glob("*/*.py")) if "@triton.jit" in file.read_text(encoding="utf-8")]
    files = [file for file in files if not operators or file.parent.name in operators]
    chosen = [edit for file in files for edit in draw(list(edits(file)), per_kernel, random.Random(seed))]
    workplaces = [copy_of_the_repository() for _ in range(workers)]
    free = list(workplaces)
    for file in files:
        untouched = Edit(file, "", "", 0, "", "", file.read_text(encoding="utf-8"))
        if noticed(untouched, workplaces[0]):
            raise click.ClickException(f"{file.relative_to(ROOT)}: its tests fail without any edit")

    def judge(edit: Edit) -> bool:
        workplace = free.pop()
        try:
            return noticed(edit, workplace)
        finally:
            free.append(workplace)

    console, survivors = Console(width=160), []
    with ThreadPoolExecutor(workers) as pool, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("edits", total=len(chosen))
        for edit, caught in zip(chosen, pool.map(judge, chosen), strict=True):
            progress.advance(task)
            if not caught:
                survivors.append(edit)
    table = Table(
        "file", "kernel", "line", "kind", "before", "after", title=f"{len(chosen) - len(survivors)} of {len(chosen)} edits caught"
    )
    for edit in survivors:
        where = str(edit.file.relative_to(ROOT))
        table.add_row(where, edit.kernel, str(edit.line), edit.kind, edit.before, edit.after)
    console.print(table)
    for workplace in workplaces:
        shutil.rmtree(workplace)


def draw(found: list[Edit], per_kernel: int, generator: random.Random) -> Iterator[Edit]:
    for kernel in dict.fromkeys(edit.kernel for edit in found):
        kinds = {kind: [edit for edit in found if edit.kernel == kernel and edit.kind == kind] for kind in ("index", "mask", "sign")}
        for pile in kinds.values():
            generator.shuffle(pile)
        for turn in range(per_kernel):
            piles = [pile for pile in kinds.values() if pile]
            if piles:
                yield piles[turn % len(piles)].pop()


def copy_of_the_repository() -> Path:
    workplace = Path(tempfile.mkdtemp(prefix="mutations-"))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in tracked:
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, workplace / name, follow_symlinks=False)
    return workplace


if __name__ == "__main__":
    main()

"""Terminal output: tables that fit the width of the terminal, and progress on stderr."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", console: Console | None = None) -> None:
    """Print a table. One that is wider than the console is split by columns; each part repeats the first column."""
    console = console or Console()
    if title:
        console.print(Text(title, style="bold"))
    widths = [3 + max(map(cell_len, cells)) for cells in zip(headers, *rows, strict=True)]
    columns = list(range(1, len(headers)))
    while columns:
        part, width = [0, columns.pop(0)], 1 + widths[0]
        width += widths[part[1]]
        while columns and width + widths[columns[0]] <= console.width:
            width += widths[columns[0]]
            part.append(columns.pop(0))
        table = Table()
        for i in part:
            is_text = i == 0 or not any(row[i][:1].isdigit() for row in rows)
            table.add_column(Text(headers[i]), justify="left" if is_text else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[i]) for i in part))
        console.print(table)


def print_markdown(text: str, console: Console | None = None) -> None:
    """Print Markdown whose tables are printed by `print_table`, and the rest as it is."""
    console = console or Console()
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
        elif table:
            headers, _, *rows = table
            print_table(headers, rows, console=console)
            table = []
        if line and not line.startswith("|"):
            console.print(line.lstrip("# "), markup=False, highlight=False, style="bold" if line.startswith("#") else "")


@contextmanager
def spinner(what: str, after: float = 1.5) -> Iterator[None]:
    """While the block runs, show `what` and the elapsed time on stderr, starting after `after` seconds."""
    console = Console(stderr=True)
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)
    progress.add_task(what, total=None)
    timer = threading.Timer(after, progress.start if console.is_terminal else lambda: console.print(f"{what} ...", highlight=False))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of items done so far; shows a bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda done: progress.update(bar, completed=done)


def print_results(results: dict[str, Any]) -> None:
    """Print the results of an evaluation."""
    guesses = results["majority_by_level"]
    rows = [(str(level), f"{share:.1%}", f"{guesses[level]:.1%}") for level, share in results["whole_by_level"].items()]
    rows += [
        ("all tokens of answers", f"{results['accuracy']:.1%}", ""),
        ("best guess without the context", f"{results['chance']:.1%}", ""),
    ]
    rows += [("first answer of a sequence", f"{results['first']:.1%}", "")]
    if results["wrong_window"] is not None:
        rows.append(("windows of another sequence", f"{results['wrong_window']:.1%}", ""))
    rows += [("whole sequences", f"{results['exact']:.1%}", "")]
    if results["exact_chance"] is not None:
        rows.append(("whole sequences, best guess", f"{results['exact_chance']:.2%}", ""))
    title = f"{results['model']} on {results['task']}: {results['answers']:,} held-out answers"
    print_table([results["level_name"], "right", "majority"], rows, title=title)

"""Terminal output: tables that fit the width of the terminal, and progress on stderr."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zoo.errors import counted


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
    """Show `what` and the elapsed time on stderr while the block runs, starting after `after` seconds."""
    console = Console(stderr=True)
    named = TextColumn("{task.description}", markup=False)
    progress = Progress(SpinnerColumn(), named, TimeElapsedColumn(), console=console, transient=True)
    progress.add_task(what, total=None)
    announce = progress.start if console.is_terminal else lambda: console.print(Text(f"{what} ..."))
    timer = threading.Timer(after, announce)
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
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda done: progress.update(bar, completed=done)


def print_results(results: dict[str, Any]) -> None:
    """Print the results of an evaluation."""
    guesses, losses = results["majority_by_level"], results["loss_by_level"]
    rows = [
        (str(level), f"{share:.1%}", f"{losses[level]:.3f}", f"{guesses[level]:.1%}") for level, share in results["whole_by_level"].items()
    ]
    rows += [
        ("all tokens of answers", f"{results['accuracy']:.1%}", f"{results['loss']:.3f}", ""),
        ("best guess without the context", f"{results['chance']:.1%}", "", ""),
        ("first answer of a sequence", f"{results['first']:.1%}", "", ""),
    ]
    if results["wrong_window"] is not None:
        rows.append(("windows of another sequence", f"{results['wrong_window']:.1%}", "", ""))
    rows += [("whole sequences", f"{results['exact']:.1%}", "", "")]
    if results["exact_chance"] is not None:
        rows.append(("whole sequences, best guess", f"{results['exact_chance']:.2%}", "", ""))
    scored = "predicted tokens" if results["level_name"] == "window" else "held-out answers"
    title = f"{results['model']} on {results['task']}: {results['answers']:,} {scored}"
    print_table([results["level_name"], "right", "loss", "majority"], rows, title=title)
    if results["level_name"] != "window" and len(results["by_window"]) > 1:
        windows = [(str(n), f"{share:.1%}", f"{results['loss_by_window'][n]:.3f}") for n, share in results["by_window"].items()]
        print_table(["window", "right", "loss"], windows)
    said = [f"loss {results['loss']:.4f} nats per token", f"perplexity {results['perplexity']:.4g}"]
    if results["bits_per_byte"] is not None:
        said.append(f"{results['bits_per_byte']:.4f} bits per byte")
    print_line(f"{', '.join(said)}; {_passes(results)}")


def print_comparison(results: dict[str, Any]) -> None:
    """Print two tables of `zoo.training.compare.comparison`: results and costs, and the loss in at most five windows."""
    run = [line for line in results["arms"] if "refused" not in line]
    all_windows = sorted({n for line in run for n in line["loss_by_window"]})
    windows = sorted({all_windows[at * (len(all_windows) - 1) // 4] for at in range(5)}) if run else []
    in_bytes = any(line["bits_per_byte"] is not None for line in run)
    headers = ["", "N", "loss", *(["bits/byte"] if in_bytes else []), "right", "tokens/s", "state"]
    rows, by_window = [], []
    for line in run:
        name = line["name"].replace("own weights", "itself")  # within 80 columns
        cells = [name, str(line["loops"]), f"{line['loss']:.4f}", *([f"{line['bits_per_byte']:.4f}"] if in_bytes else [])]
        rows.append([*cells, f"{line['accuracy']:.1%}", f"{line['tokens_per_second']:,}", decimal(line["state_bytes"])])
        by_window.append([name, *(f"{line['loss_by_window'].get(n, math.nan):.4f}" for n in windows)])
    title = f"{results['folder']} on {results['task']}: {counted(results['sequences'], 'held-out sequence')}"
    print_table(headers, rows, title=title)
    if len(windows) > 1:
        some = f" ({len(windows)} of {len(all_windows)})" if len(windows) < len(all_windows) else ""
        print_table([f"loss in window{some}", *map(str, windows)], by_window)
    for line in results["arms"]:
        if "refused" in line:
            print_line(f"{line['name']}: {line['refused']}")
    parents = [line["folder"] for line in results["arms"] if line["name"].startswith("parent")]
    print_line(f"parent: {parents[0]}" if parents else "no parent is known; give --parent FOLDER to compare with one")


def print_probe(results: dict[str, Any]) -> None:
    """Print the results of `zoo.training.probe.probe`."""
    accuracy, norms = results["accuracy"], results["norms"]
    named = {"S": "S", "untrained": "untrained S", "shuffled": "shuffled labels", "answers": "model's answers"}
    rows = [
        [f"{name}, pass {n}", *("" if right is None else f"{right:.1%}" for right in by_hop)]
        for key, name in named.items()
        for n, by_hop in enumerate(accuracy[key], 1)
    ]
    hops = ["1 hop", *(f"{hop} hops" for hop in range(2, len(accuracy["window"][0]) + 1))]
    rows.append(["window", *(f"{right:.1%}" for right in accuracy["window"][0])])
    rows.append(["best guess", *[f"{results['chance']:.1%}"] * len(hops)])
    print_table(["read from", *hops], rows, title=f"{results['model']} on {results['task']}")
    passes = [[str(n + 1), *(f"{norm[n]:.4g}" if n < len(norm) else "" for norm in norms.values())] for n in range(results["loops"])]
    print_table(["pass", *norms], passes, title="norms per cycle")
    print_line(
        f"{results['entries']:,} entries of S, read as {results['features']:,} features; fitted on {results['fitted']:,} held-out cycles, "
        f"strength chosen on {results['chosen_on']:,}, scored on {results['scored']:,}"
    )


def print_line(text: str) -> None:
    """Print a text as it is."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _passes(results: dict[str, Any]) -> str:
    """Return the passes per sleep of an evaluation, and as trained where they differ."""
    trained = results.get("trained_loops", results["loops"])
    step = "" if results.get("step") is None else f"; {results['folder']}"
    return f"N = {results['loops']}" + ("" if trained == results["loops"] else f" (trained with N = {trained})") + step

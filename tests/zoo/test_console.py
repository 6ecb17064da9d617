"""Output in the terminal: tables within the width of the console, progress on stderr."""

import io
import time

import pytest
from rich.console import Console

from zoo import console

HEADERS = ["arm", "steps", *(f"{n} hops" for n in range(2, 12))]
ROWS = [["loops 1 [x]", "1,000", *("12.3% (11.0-13.0)" for _ in range(10))], ["loops 2", "500", *("" for _ in range(10))]]


def printed(show, width=80, terminal=False):
    file = io.StringIO()
    show(Console(file=file, width=width, force_terminal=terminal))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200, 400])
def test_a_table_fits_the_console_and_keeps_every_cell(width):
    text = printed(lambda screen: console.print_table(HEADERS, ROWS, console=screen), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(cell in text for cell in [*HEADERS, *ROWS[0], *ROWS[1]])
    assert text.count("loops 1 [x]") == text.count("loops 2") == text.count("arm")
    assert (text.count("arm") == 1) == (width == 400)


@pytest.mark.parametrize("name", ["parent", "own weights"])
def test_a_comparison_is_two_tables_of_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = {
        "folder": "parent",
        "evict": "hard",
        "window": 32,
        "loops": 1,
        "perplexity": 9.0,
        "tokens_per_second": 54321,
        "state_bytes": 1_234_567,
    }
    run |= {"loss": 12.3456, "bits_per_byte": 12.3456, "accuracy": 0.123}
    named = [f"{name}, full attention", f"{name}, sliding window", f"{name}, hard eviction", "this model, N = 1", "this model"]
    arms = [{**run, "name": arm, "loss_by_window": {n: n + k / 10 for n in range(1, 10)}} for k, arm in enumerate(named)]
    arms[1] = {"name": named[1], "folder": "parent", "refused": "learned_positions"}
    console.print_comparison({"folder": "runs/mine", "task": "text", "sequences": 1, "arms": arms})
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("\u250f") == 2
    assert "1 held-out sequence\n" in said
    assert [row.split()[-2] for row in said.splitlines() if "this model " in row][-1] == "9.4000"
    assert "loss in window (5 of 9)" in said
    assert f"{named[1]}: learned_positions" in said


def test_the_tables_of_markdown_are_printed_the_same():
    markdown = "\n".join(f"| {' | '.join(cells)} |" for cells in [HEADERS, ["---"] * len(HEADERS), *ROWS])
    text = printed(lambda screen: console.print_markdown(f"## Title\n\n{markdown}\n\nA line [1].\n", screen))
    assert text == f"Title\n{printed(lambda screen: console.print_table(HEADERS, ROWS, console=screen))}A line [1].\n"


def test_a_slow_step_is_announced_on_stderr_and_a_quick_one_is_not(capsys):
    with console.spinner("quick", after=60):
        pass
    with console.spinner("slow", after=0.01):
        time.sleep(0.5)
    assert capsys.readouterr() == ("", "slow ...\n")


def test_a_progress_bar_prints_nothing_in_a_pipe(capsys):
    with console.progress_bar("evaluating", 3) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


def test_brackets_in_names_are_shown(capsys):
    with console.spinner("loading runs[v2]/[/x]", after=0.01):
        time.sleep(0.5)
    assert capsys.readouterr() == ("", "loading runs[v2]/[/x] ...\n")

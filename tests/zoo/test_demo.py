"""The demo's table and picture, from made-up results: the training itself takes minutes."""

import io

from matplotlib.figure import Figure
from rich.console import Console

from tests.zoo.training.test_plots import write
from zoo.demo import _show, draw
from zoo.tasks import new_task

ROWS = {
    n: {
        "answers": 4096,
        "chance": 1 / 11,
        "by_level": {hops: 1 / hops for hops in (1, 2, 3, 4)},
        "accuracy": 0.5208,
        "onnx_accuracy": 0.5209,
        "onnx_logit_difference": 3.1e-5,
        "seconds_per_sleep": 0.0123,
        "seconds_per_token": 0.00456,
    }
    for n in (1, 2, 4)
}


def test_the_table_fits_80_columns():
    written = io.StringIO()
    _show(ROWS, new_task({"name": "cycle", "nodes": 12, "hops": 4}), Console(file=written, width=80))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = [line.replace("│", " ").split() for line in lines]
    rows = [[cell for line in words if line[:1] == [n] for cell in line[1:]] for n in "124"]
    assert rows == [["100.0%", "50.0%", "33.3%", "25.0%", "52.1%", "52.1%", "3.1e-05", "0.0123", "4.56"]] * 3
    text = " ".join(lines)
    assert "1 hop " in text
    assert "4 hops" in text


def test_the_picture_shows_accuracy_by_hops_and_by_tokens(tmp_path, monkeypatch):
    for n in ROWS:
        write(tmp_path / f"sleep{n}", n=n)
    drawn = []
    monkeypatch.setattr("zoo.demo.save", lambda figure, out: drawn.append((figure, out)))
    draw(ROWS, tmp_path)
    ((figure, out),) = drawn
    assert isinstance(figure, Figure)
    assert out == tmp_path / "demo.png"
    by_hops, by_tokens = figure.axes
    assert (by_hops.get_xlabel(), by_tokens.get_xlabel()) == ("hops", "training tokens (millions)")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["N = 1", "N = 2", "N = 4", "best guess without the context"]

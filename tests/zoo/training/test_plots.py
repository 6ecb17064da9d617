"""Plots: the points that are drawn, against the numbers in the files of the runs."""

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import zoo
from zoo.cli import main
from zoo.training.config import TrainConfig
from zoo.training.plots import figure, grouped, read_run


def write(path, *, n=1, seed=0, right=0.5, finished=True, **changes):
    """Write the folder of a run with two logged steps, without training."""
    fields = {
        "model": f"gdn4-sleep{n}-hard5",
        "task": {"name": "cycle", "nodes": 5, "hops": 2},
        "steps": 20,
        "seed": seed,
        **changes,
    }
    path.mkdir()
    (path / "train.yaml").write_text(yaml.safe_dump(TrainConfig(**fields).model_dump(mode="json")))
    lines = [
        {"step": step, "tokens": step * 100_000, "loss": 3.0 - step / 10, "accuracy": right, "by_level": {1: right, 2: right / 2}}
        for step in (10, 20)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    if finished:
        (path / "results.json").write_text(json.dumps({"by_level": {1: right, 2: right / 2}, "chance": 0.25, "level_name": "hops"}))
    return path


def panels(drawn):
    return {(axes.get_title(), axes.get_xlabel()): axes for axes in drawn.axes if axes.axison}


def lines(axes):
    """Return the points of all lines but the best guess."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines() if line.get_linestyle() == "-"]


def test_curves_and_what_was_reached(tmp_path):
    found = [
        write(tmp_path / "a", n=1, seed=0, right=0.4),
        write(tmp_path / "b", n=1, seed=1, right=0.6),
        write(tmp_path / "c", n=4, right=0.9),
        write(tmp_path / "d", n=4, seed=9, right=0.1, finished=False),
    ]
    groups = grouped(read_run(path) for path in found)
    assert {name: len(runs) for name, runs in groups.items()} == {"N=1": 2, "N=4": 2}
    drawn = panels(figure(groups))
    tokens = "training tokens (millions)"
    by_hops, by_n = ("Held-out accuracy by hops", "hops"), ("Held-out accuracy by N", "N (passes per sleep)")
    training = [("Training loss", tokens), ("Training accuracy, 1 hop", tokens), ("Training accuracy, 2 hops", tokens)]
    assert drawn.keys() == {*training, by_hops, by_n}
    assert [axes.get_ylabel() for axes in drawn.values()] == ["loss", *["accuracy"] * 4]
    assert lines(drawn[training[0]]) == [[(1.0, 2.0), (2.0, 1.0)]] * 4
    assert lines(drawn[training[2]]) == [[(1.0, y), (2.0, y)] for y in (0.2, 0.3, 0.45, 0.05)]
    assert lines(drawn[by_hops]) == [[(1, 0.5), (2, 0.25)], [(1, 0.9), (2, 0.45)]]
    assert lines(drawn[by_n]) == [[(1, 0.5), (4, 0.9)], [(1, 0.25), (4, 0.45)]]
    ranges = [segment.tolist() for bars in drawn[by_hops].collections for segment in bars.get_segments()]
    assert [[1.0, 0.4], [1.0, 0.6]] in ranges
    dotted = [line.get_ydata()[0] for line in drawn[training[1]].get_lines() if line.get_linestyle() == ":"]
    assert dotted == [0.25]


def test_seeds_may_have_been_asked_at_different_levels(tmp_path):
    """With few held-out sequences; each level shows the runs that have it."""
    asked = {"a": (1, 0, {2: 0.4}), "b": (1, 1, {1: 0.5, 3: 0.3}), "c": (4, 0, {3: 0.7}), "d": (4, 1, {1: 0.9, 3: 0.5})}
    runs = [write(tmp_path / name, n=n, seed=seed) for name, (n, seed, _) in asked.items()]
    for run, (*_, right) in zip(runs, asked.values(), strict=True):
        (run / "results.json").write_text(json.dumps({"by_level": right, "chance": 0.25}))
    drawn = panels(figure(grouped(map(read_run, runs))))
    assert lines(drawn["Held-out accuracy by hops", "hops"]) == [[(1, 0.5), (2, 0.4), (3, 0.3)], [(1, 0.9), (3, 0.6)]]
    by_n = drawn["Held-out accuracy by N", "N (passes per sleep)"]
    assert lines(by_n) == [[(1, 0.5), (4, 0.9)], [(1, 0.4)], [(1, 0.3), (4, 0.6)]]
    assert [text.get_text() for text in by_n.get_legend().get_texts()] == ["1 hop", "2 hops", "3 hops"]


def test_runs_on_text_show_loss(tmp_path):
    for name in ("train", "test"):
        np.save(tmp_path / f"{name}.npy", np.full(20, len(name), np.uint8))
    task = {
        "name": "text",
        "train": str(tmp_path / "train.npy"),
        "test": str(tmp_path / "test.npy"),
        "width": 5,
        "length": 10,
        "vocab": 256,
    }
    runs = [write(tmp_path / name, n=n, task=task, finished=False) for name, n in (("a", 1), ("b", 4))]
    for run, n in zip(runs, (1, 4), strict=True):
        (run / "metrics.jsonl").write_text(
            json.dumps({"step": 9, "tokens": 9e5, "loss": 4 / n, "accuracy": 0.5, "by_level": {1: 0.5, 2: 0.4}}) + "\n"
        )
        held_out = {"by_level": {1: 0.5, 2: 0.4}, "chance": 0.25, "loss": 2 / n}
        held_out |= {"loss_by_level": {1: 2.5 / n, 2: 1.5 / n}, "loss_by_eighth": {1: 3 / n, 8: 1 / n}}
        (run / "results.json").write_text(json.dumps(held_out))
    drawn = panels(figure(grouped(map(read_run, runs))))
    tokens, eighth = "training tokens (millions)", "eighth of the window"
    by_eighth, by_n = ("Held-out loss by position in the window", eighth), ("Held-out loss by N", "N (passes per sleep)")
    by_window = ("Held-out loss by window", "window")
    assert drawn.keys() == {("Training loss", tokens), by_window, by_eighth, by_n}
    assert lines(drawn[by_window]) == [[(1, 2.5), (2, 1.5)], [(1, 0.625), (2, 0.375)]]
    assert lines(drawn["Training loss", tokens]) == [[(0.9, 4.0)], [(0.9, 1.0)]]
    assert all(line.get_marker() == "o" for line in drawn["Training loss", tokens].get_lines())  # a line of one point is invisible
    assert lines(drawn[by_eighth]) == [[(1, 3.0), (8, 1.0)], [(1, 0.75), (8, 0.25)]]
    assert lines(drawn[by_n]) == [[(1, 2.0), (4, 0.5)]]
    assert {axes.get_ylabel() for axes in drawn.values()} == {"loss"}


def test_names_say_what_differs(tmp_path):
    found = [
        write(tmp_path / "a", lr=0.1),
        write(tmp_path / "b", lr=0.2, overrides={"blocks": {"gdn": {"heads": 2}}}),
        write(tmp_path / "c", lr=0.2, overrides={"blocks": {"gdn": {"heads": 8}}}, steps=30),
    ]
    assert list(grouped(read_run(path) for path in found)) == [
        "steps=20 lr=0.1 model.blocks.gdn.heads=4", "steps=20 lr=0.2 model.blocks.gdn.heads=2", "steps=30 lr=0.2 model.blocks.gdn.heads=8",
    ]  # fmt: skip
    assert list(grouped([read_run(found[0])])) == ["gdn4-sleep1-hard5"]


def test_the_majority_is_drawn_where_there_are_two_answers(tmp_path):
    task = {"name": "rule110", "width": 7, "strings": 1, "steps": 2}
    run = read_run(write(tmp_path / "a", task=task, finished=False))
    assert run.task.chance() != 0.5
    (right,) = (axes for axes in figure({"a": [run]}).axes if axes.get_title() == "Training accuracy, 1 step")
    assert [line.get_ydata()[0] for line in right.get_lines() if line.get_linestyle() == ":"] == [run.task.chance()]


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["plot", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_sixteen_arms_are_distinct_and_their_legend_stays_in_the_picture(tmp_path):
    names = [f"layers=(attn gdn)*2 overrides.blocks.gdn.heads={i} task.hops=2 lr=0.001 steps=1000 {'x' * (i + 1)}" for i in range(16)]
    groups = {name: [read_run(write(tmp_path / str(i)))] for i, name in enumerate(names)}
    drawn = figure(groups)
    drawn.canvas.draw()
    (legend,) = drawn.legends
    inside, whole = legend.get_window_extent(), drawn.bbox
    assert whole.x0 <= inside.x0 < inside.x1 <= whole.x1
    assert whole.y0 <= inside.y0 < inside.y1 <= whole.y1
    assert [" ".join(text.get_text().split()) for text in legend.get_texts()] == [*names, "best guess without the context"]
    curves = drawn.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == len(curves) == 16
    assert all(axes.get_window_extent().height > 100 for axes in drawn.axes if axes.axison)


def test_the_command(tmp_path):
    found = [write(tmp_path / "a", n=1), write(tmp_path / "b", n=2)]
    run(*found, "--out", tmp_path / "new" / "curves.svg")
    written = (tmp_path / "new" / "curves.svg").read_text()
    assert "<svg" in written
    assert "already exists" in run(*found, "--out", tmp_path / "new" / "curves.svg", status=2).stderr
    assert (tmp_path / "new" / "curves.svg").read_text() == written
    assert "want a file name that ends in one of .pdf, .png, .svg" in run(*found, "--out", tmp_path / "curves.exe", status=2).stderr
    assert "not the folder of a training run" in run(tmp_path, "--out", tmp_path / "x.png", status=2).stderr
    (tmp_path / "a" / "metrics.jsonl").unlink()
    with pytest.raises(zoo.ZooError, match="nothing to draw"):
        read_run(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "new"]

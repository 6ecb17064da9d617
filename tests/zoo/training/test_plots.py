"""Plots: what is drawn where, beside the numbers in the runs' files."""

import json

import pytest
import yaml
from click.testing import CliRunner

import zoo
from zoo.cli import main
from zoo.training.config import TrainConfig
from zoo.training.plots import figure, grouped, read_run


def write(path, *, n=1, seed=0, right=0.5, finished=True, **changes):
    """A run's folder of two logged steps, without the training."""
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
    """Points of the lines that are not the best guess."""
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
    tokens = "million training tokens"
    assert drawn.keys() == {
        ("loss while training", tokens), ("hops: 1", tokens), ("hops: 2", tokens), ("held out", "hops"), ("held out", "N, passes of sleep"),
    }  # fmt: skip
    assert lines(drawn["loss while training", tokens]) == [[(1.0, 2.0), (2.0, 1.0)]] * 4
    assert lines(drawn["hops: 2", tokens]) == [[(1.0, y), (2.0, y)] for y in (0.2, 0.3, 0.45, 0.05)]
    assert lines(drawn["held out", "hops"]) == [[(1, 0.5), (2, 0.25)], [(1, 0.9), (2, 0.45)]]
    assert lines(drawn["held out", "N, passes of sleep"]) == [[(1, 0.5), (4, 0.9)], [(1, 0.25), (4, 0.45)]]
    ranges = [segment.tolist() for bars in drawn["held out", "hops"].collections for segment in bars.get_segments()]
    assert [[1.0, 0.4], [1.0, 0.6]] in ranges
    dotted = [line.get_ydata()[0] for line in drawn["hops: 1", tokens].get_lines() if line.get_linestyle() == ":"]
    assert dotted == [0.25]


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
    (right,) = (axes for axes in figure({"a": [run]}).axes if axes.get_title() == "steps: 1")
    assert [line.get_ydata()[0] for line in right.get_lines() if line.get_linestyle() == ":"] == [run.task.chance()]


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["plot", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


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

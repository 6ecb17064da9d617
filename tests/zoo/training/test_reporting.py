"""Metrics reach TensorBoard and Weights & Biases unchanged from metrics.jsonl; utilisation and time left are arithmetic."""

import importlib
import json
import re
import signal
import sys
import time
import types
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.cli import main
from zoo.costs import peak_flops, training_flops
from zoo.tasks import new_task
from zoo.training.config import read_config
from zoo.training.reporting import _line, _time_left, add_run, advance, new_progress, tensorboard
from zoo.training.trackers import flat

RUN = """
model: gdn4-sleep2-hard6
overrides: {layers: attn gdn, d_model: 16, d_ff: 16}
task: {name: cycle, nodes: 6, hops: 2}
steps: 6
batch_size: 4
eval_sequences: 4
log_every: 1
checkpoint_every: 2
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def command(*arguments, status=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """Name -> step -> value, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return {name: {event.step: event.value for event in board.Scalars(name)} for name in board.Tags()["scalars"]}


def test_tensorboard_shows_what_the_lines_say(tmp_path, config):
    command("train", config, "--out", tmp_path / "run")
    shown = events(tmp_path / "run" / "tensorboard")
    assert {"loss", "accuracy", "by_level/1", "by_level/2", "grad_norm", "lr", "tokens_per_second", "memory"} <= shown.keys()
    for line in lines(tmp_path / "run"):
        for name in ("loss", "grad_norm", "lr", "tokens"):
            assert shown[name][line["step"]] == pytest.approx(line[name], rel=1e-6)
        for level, share in line["by_level"].items():
            assert shown[f"by_level/{level}"][line["step"]] == pytest.approx(share, rel=1e-6)


def test_nested_metrics_have_paths():
    line = {"step": 3, "loss": 1.5, "by_level": {"2": 0.5}, "experts_by_pass": {"1": {"busiest": 2.0, "unused": 0.25}}}
    wanted = {"loss": 1.5, "by_level/2": 0.5, "experts_by_pass/1/busiest": 2.0, "experts_by_pass/1/unused": 0.25}
    assert flat(line) == wanted


def test_a_resumed_run_drops_the_steps_it_repeats(tmp_path, config):
    config = read_config(config)
    for first, loss in ((1, 1.0), (3, 2.0)):  # killed after 5, saved at 2
        with tensorboard(config, tmp_path) as write:
            for step in range(first, 6):
                write({"step": step, "loss": loss, "by_level": {}})
        time.sleep(1)  # readers order the event files by the second in their names
    assert events(tmp_path / "tensorboard")["loss"] == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}


def test_without_tensorboard_nothing_is_written(tmp_path, config, monkeypatch):
    monkeypatch.setattr("zoo.training.reporting.find_spec", lambda name: None)
    command("train", config, "steps=1", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_weights_and_biases(tmp_path, config, monkeypatch):
    calls, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: calls.append("finish"))

    def init(**settings):
        assert (tmp_path / "run").is_dir()
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    command("train", config, "--out", tmp_path / "run", "--wandb", "sleep")
    settings, end = calls
    assert end == "finish"
    assert (settings["project"], settings["name"], settings["resume"]) == ("sleep", "run", "allow")
    assert settings["config"]["steps"] == 6
    assert [(step, values["loss"]) for step, values in logged] == [(m["step"], m["loss"]) for m in lines(tmp_path / "run")]
    assert "by_level/2" in logged[0][1]
    command("train", config, "--out", tmp_path / "other", "--wandb", "sleep")
    assert calls[2]["id"] != settings["id"]


def test_weights_and_biases_not_installed_is_an_error_before_any_work(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = command("train", config, "--out", tmp_path / "run", "--wandb", "sleep", status=2).stderr
    assert "--wandb: sleep: needs pip install 'sleep-zoo[wandb]'" in said
    assert not (tmp_path / "run").exists()


STUB = """
import time
from zoo.training.trackers import Tracker

CALLS = []


class Stub(Tracker):
    def begin(self, run_id, name, config, folder):
        CALLS.append((run_id, name, config))

    def log(self, step, metrics):
        CALLS.append((step, metrics))

    def end(self):
        CALLS.append("end")


class Failing(Stub):
    def log(self, step, metrics):
        super().log(step, metrics)
        raise ConnectionError("no answer\\nfrom the service")


class Hanging(Stub):
    def begin(self, run_id, name, config, folder):
        time.sleep(600)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Return a module with trackers, as a user would write it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "my_trackers.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield importlib.import_module("my_trackers")
    del sys.modules["my_trackers"]


def test_a_tracker_gets_config_steps_and_the_same_run_when_resumed(tmp_path, config, stub, monkeypatch):
    monkeypatch.setattr("zoo.training.loop.deferred", lambda: nullcontext(lambda: signal.SIGTERM))
    command("train", config, "--out", tmp_path / "run", "--track", "my_trackers:Stub", status=143)
    monkeypatch.undo()
    command("train", config, "--out", tmp_path / "run", "--track", "my_trackers:Stub")
    command("train", config, "--out", tmp_path / "other", "--track", "my_trackers:Stub")
    begins = [call for call in stub.CALLS if len(call) == 3 and call != "end"]
    (first, name, fields), (resumed, again, _), (other, *_) = begins
    assert (first, name) == (resumed, again) == (first, "run")
    assert other != first
    assert (fields["steps"], fields["task"]) == (6, {"name": "cycle", "nodes": 6, "hops": 2})
    steps = [call for call in stub.CALLS if len(call) == 2]
    assert [step for step, _ in steps] == [*range(1, 7), *range(1, 7)]
    for (_, metrics), line in zip(steps, lines(tmp_path / "run"), strict=False):
        assert metrics["loss"] == line["loss"]
        assert metrics["by_level/1"] == line["by_level"]["1"]
    assert stub.CALLS.count("end") == 3


def test_a_tracker_that_fails_or_hangs_only_causes_a_warning(tmp_path, config, stub, monkeypatch):
    monkeypatch.setattr("zoo.training.trackers.PATIENCE", 0.1)
    said = command("train", config, "--out", tmp_path / "run", *("--track", "my_trackers:Failing", "--track", "my_trackers:Hanging")).stderr
    assert "tracker Failing: ConnectionError: no answer from the service; it receives no more metrics of this run\n" in said
    assert "tracker Hanging: has not answered for 0.1 seconds" in said
    assert said.count("tracker ") == 2
    assert [step for step, _ in stub.CALLS[1:]] == [1]
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 7))
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "unknown tracker 'wandbb'; did you mean 'wandb'? allowed: aim, clearml, comet_ml, dvclive, mlflow, swanlab, "),
        ("my_trackers:Nothing", "--track: my_trackers:Nothing: AttributeError: "),
        ("nowhere.at_all:Stub", "--track: nowhere.at_all:Stub: ModuleNotFoundError: "),
        ("pathlib:Path", "--track: pathlib:Path: PosixPath; want a subclass of zoo.training.trackers.Tracker"),
    ],
)
def test_a_tracker_that_is_none_is_an_error_before_any_work(tmp_path, config, stub, name, message):
    said = command("train", config, "--out", tmp_path / "run", "--track", name, status=2).stderr
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_accelerate_not_installed_is_an_error_before_any_work(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    said = command("train", config, "--out", tmp_path / "run", "--track", "trackio", status=2).stderr
    assert said == "Error: --track: trackio: needs pip install accelerate trackio\n"


@pytest.mark.extended
def test_a_tracker_of_accelerate_that_is_not_installed_is_an_error(tmp_path, config, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    said = command("train", config, "--out", tmp_path / "run", "--track", "mlflow", status=2).stderr
    assert said == "Error: --track: mlflow: needs pip install mlflow\n"


@pytest.mark.extended
def test_a_tracker_of_accelerate_gets_config_steps_and_the_same_run_when_resumed(tmp_path, config, monkeypatch):
    """A stub stands in for trackio, behind accelerate's own class."""
    from accelerate.utils import LoggerType

    calls, logged, fields = [], [], {}
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: calls.append("finish"))
    stub = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings) or run,
        config=types.SimpleNamespace(update=lambda values, allow_val_change: fields.update(values)),
    )
    monkeypatch.setitem(sys.modules, "trackio", stub)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    with monkeypatch.context() as stopping:
        stopping.setattr("zoo.training.loop.deferred", lambda: nullcontext(lambda: signal.SIGTERM))
        command("train", config, "--out", tmp_path / "run", "--track", "trackio", status=143)
    for folder in ("run", "other"):
        command("train", config, "--out", tmp_path / folder, "--track", "trackio")
    first, resumed, other = calls[::2]
    assert calls[1::2] == ["finish"] * 3
    assert first == resumed
    assert first["resume"] == "allow"
    assert other["name"] != first["name"]
    assert (fields["steps"], fields["task/name"], fields["dtype"]) == (6, "cycle", "float32")
    assert [step for step, _ in logged] == [*range(1, 7), *range(1, 7)]
    for (_, metrics), line in zip(logged, lines(tmp_path / "run"), strict=False):
        assert (metrics["loss"], metrics["by_level/1"]) == (line["loss"], line["by_level"]["1"])


@pytest.mark.extended
def test_a_tracker_of_accelerate_without_a_network(tmp_path, config):
    command("train", config, "--out", tmp_path / "run", "--track", "tensorboard")
    shown = events(tmp_path / "run" / "sleep-zoo")
    for name in ("loss", "grad_norm", "lr"):
        assert shown[name] == pytest.approx({line["step"]: line[name] for line in lines(tmp_path / "run")}, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_utilisation(tmp_path, config, monkeypatch):
    """FLOPs of a token in training, as torch counts them, times tokens per second, of what the device could do."""
    monkeypatch.setattr("zoo.training.loop.peak_flops", lambda device: 1e9)
    command("train", config, "overrides.layers=attn swa", "overrides.evict=sliding", "dtype=bfloat16", "--out", tmp_path / "run")
    model = zoo.load(tmp_path / "run")
    ids, mask, _ = (torch.from_numpy(x) for x in new_task({"name": "cycle", "nodes": 6, "hops": 2}).batch(0, 0, 4))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.answers(ids, mask).losses().sum().backward()
    assert training_flops(model, mask) == pytest.approx(counter.get_total_flops(), rel=0.1)  # the first layer's input has no gradient
    read = len(ids) * int(mask.any(dim=0).nonzero().max())  # the last answer is not read
    for line in lines(tmp_path / "run"):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * training_flops(model, mask) / read / 1e9, abs=1e-4)
    command("train", config, "--out", tmp_path / "float32")
    assert "mfu" not in lines(tmp_path / "float32")[0]


METRICS = {
    "step": 25,
    "tokens": 50_000,
    "loss": 1.5,
    "accuracy": 0.25,
    "by_level": {1: 0.5, 2: 0.0},
    "tokens_per_second": 1000,
    "memory": 3 * 2**30,
}


def test_time_left():
    assert _time_left(METRICS, 100) == timedelta(seconds=150)
    assert _time_left(METRICS, 25) == timedelta()


def shown(progress):
    """Text of the bars, without spaces at line ends and in a row."""
    with (screen := Console(width=200)).capture() as capture:
        screen.print(progress.get_renderable())
    return " ".join(re.sub(r"[━╸╺]+", "", capture.get()).split())


def test_progress_says_it_all():
    line = _line("run", 100, {**METRICS, "mfu": 0.415})
    assert line == "run step 25/100 loss 1.500 accuracy 0.250 (50% 0%) 1,000 tokens/s  MFU 41.5% 3.0 GiB, 0:02:30 left"
    with new_progress() as progress:
        bar = add_run(progress, "run", 100)
        assert shown(progress) == "run 0/100 --:-- starting"
        advance(progress, bar, METRICS)
        assert progress.tasks[bar].fields["mfu"] == ""
        assert shown(progress).endswith("loss 1.500 right 25.0% (50% 0%) 1,000 tokens/s 3.0 GiB")
        advance(progress, bar, {**METRICS, "mfu": 0.415})
        assert progress.tasks[bar].fields["mfu"].strip() == "MFU 41.5%"

"""An interrupted run ends bit-identical to an uninterrupted one, and a folder is never mistaken for that of another run."""

import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from tests.zoo.training.tiny import TINY, check_resumes, tiny
from zoo.signals import StoppedError
from zoo.tasks import new_task
from zoo.training.loop import train
from zoo.training.run_folder import NotFiniteError, RunFolder


@pytest.mark.parametrize("counts", [{"float32": 2, "bfloat16": 1}, pytest.param({"float32": 15}, marks=pytest.mark.extended)])
def test_interrupted_at_any_step_and_resumed_is_bit_identical(tmp_path, counts):
    arguments = [tmp_path, *(f"{dtype}={count}" for dtype, count in counts.items())]
    command = [sys.executable, "-m", "tests.zoo.training.interrupted", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], check=True, capture_output=True, text=True)
    for dtype, cases in json.loads(done.stdout).items():
        whole = cases.pop("uninterrupted")
        assert len(cases) == 2 * counts[dtype] + 1
        assert whole["steps"] == list(range(1, 17))
        assert len(set(whole["losses"])) == 16
        for name, case in cases.items():
            assert case["losses"] == whole["losses"], name
            assert case["steps"] == whole["steps"], name
            assert case["weights"] == whole["weights"], name
            assert not [left for left in case["left"] if left.startswith(".")], name


def test_a_ramp_resumes_bit_for_bit(tmp_path):
    """Stopped after every step on the way from 1 to 5 passes."""
    check_resumes(tiny(steps=10, model="gdn4-sleep5-hard6", ramp=0.8, checkpoint_every=100), tmp_path, stops=10)


def plan(**changes):
    return tiny(**{"steps": 8, "eval_sequences": 64, "checkpoint_every": 1, "lr": 1e-2, **changes})


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    held_out = {}

    class Watched(RunFolder):
        def save(self, model, tensors, progress, *, keep):
            held_out[progress["step"]] = progress["held_out_loss"]
            path = super().save(model, tensors, progress, keep=keep)
            best = min(held_out, key=lambda step: held_out[step] or math.inf)
            expected = sorted({*list(held_out)[-2:], best})
            assert [int(p.name) for p in self.checkpoints()] == expected
            assert int(self.best().name) == best
            return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.training.loop.RunFolder", Watched)
        patch.setattr("zoo.training.loop.evaluate", lambda *_, **__: {"loss": next(losses)})
        losses = iter([3.0, 1.0, 2.0, 2.5, 0.5, 0.7, 0.6, 0.1])
        train(plan(), tmp_path / "run")
    assert list(held_out.values()) == [3.0, 1.0, 2.0, 2.5, 0.5, 0.7, 0.6, None]  # the last is evaluated after it is saved
    assert zoo.load(tmp_path / "run" / "checkpoints" / "00000005").config.name == "gdn4-sleep2-hard6"


def test_parameters_without_gradients_resume(tmp_path):
    """Nothing is injected in a single pass, so the injection never gets a gradient, nor an optimiser state."""
    config = tiny(steps=4, model="gdn4-sleep1-hard6", overrides={"layers": "attn gdn", "d_model": 16, "d_ff": 16, "inject": True})
    expected = train(config, tmp_path / "whole")
    for _ in range(3):
        with pytest.raises(StoppedError):
            train(config, tmp_path / "cut", report=lambda metrics: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config, tmp_path / "cut") == expected
    train(config.model_copy(update={"steps": 5}), tmp_path / "cut")


def test_a_task_that_does_not_fit_leaves_no_folder(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(40, dtype=np.uint8))
    np.save(tmp_path / "held-out.npy", np.arange(40, dtype=np.uint8)[::-1])
    task = {"name": "text", "train": "tokens.npy", "test": "held-out.npy", "vocab": 30, "length": 40, "width": 6}
    task |= {split: str(tmp_path / task[split]) for split in ("train", "test")}
    with pytest.raises(zoo.ZooError, match="token 39 in the train file; vocab says that ids are less than 30"):
        train(tiny(task=task), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(tiny(task=task | {"vocab": 40}), tmp_path / "run")
    with pytest.raises(zoo.ZooError, match=r"run: holds a run with task.vocab: 40, not 41; resume"):
        train(tiny(task=task | {"vocab": 41}), tmp_path / "run")


@pytest.mark.parametrize("without", [0, 1])
def test_a_field_that_is_null_is_not_one_that_is_missing(tmp_path, without):
    both = [{**TINY["overrides"], "evict": "none", "window": None}, {**TINY["overrides"], "evict": "none"}]
    train(tiny(model="gdn4", overrides=both[without]), tmp_path / "run")
    held, asked = ("its default", "None") if without else ("None", "its default")
    with pytest.raises(zoo.ZooError, match=f"holds a run with overrides.window: {held}, not {asked}; resume"):
        train(tiny(model="gdn4", overrides=both[1 - without]), tmp_path / "run")


def test_other_files_in_the_folder_of_checkpoints_stay(tmp_path):
    stopped(tiny(), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".DS_Store").write_bytes(b"from a file manager")
    for name in (".ipynb_checkpoints", ".00000001", ".00000002.zoo-unfinished-0123abcd"):
        (folder / name).mkdir()
    train(tiny(), tmp_path / "run")
    assert {entry.name for entry in folder.glob(".*")} == {".DS_Store", ".ipynb_checkpoints"}


def test_tokens_are_counted_where_batches_differ_in_length(tmp_path):
    for split in ("train", "test"):
        rows = [[{"role": "user", "content": "x" * n}, {"role": "assistant", "content": split}] for n in (3, 50, 9, 30, 5, 70, 20)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    task = {"name": "chat", "train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl"), "width": 6, "length": 200}
    config = tiny(task=task, steps=4, batch_size=1, overrides={**TINY["overrides"], "vocab_size": 256})
    stopped(config, tmp_path / "run")
    train(config, tmp_path / "run")
    logged = [json.loads(line)["tokens"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lengths = [new_task(config.task).batch(0, step, 1).tokens for step in range(4)]
    assert len(set(lengths)) > 2
    assert logged == list(itertools.accumulate(lengths))


def test_a_large_seed_trains(tmp_path):
    assert math.isfinite(train(tiny(seed=2**63 - 1, steps=3), tmp_path / "run")["loss"])


@pytest.fixture
def text(tmp_path):
    """The fields of a task whose files hold 40 tokens."""
    for split in ("train", "test"):
        write_tokens(tmp_path / f"{split}.npy", last=39)
    return {"name": "text", "vocab": 41, "length": 40, "width": 6, "train": str(tmp_path / "train.npy"), "test": str(tmp_path / "test.npy")}


def write_tokens(file, last):
    np.save(file, np.append(np.arange(39, dtype=np.uint8), np.uint8(last)))


def stopped(config, out):
    """Begin a run and stop it after its first step."""
    with pytest.raises(StoppedError):
        train(config, out, report=lambda metrics: os.kill(os.getpid(), signal.SIGTERM))


def files_of(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_whose_data_has_changed_is_not_resumed(tmp_path, text):
    config = tiny(task=text, steps=4)
    stopped(config, tmp_path / "run")
    for split in ("train", "test"):
        write_tokens(text[split], last=40)
        with pytest.raises(zoo.ZooError, match=f"run: task.{split}: changed since this run began; restore it, or begin a new run"):
            train(config, tmp_path / "run")
        write_tokens(text[split], last=39)
    train(config, tmp_path / "run")


def test_a_finished_run_is_as_it_was_when_more_steps_are_refused(tmp_path, text):
    train(tiny(task=text), tmp_path / "run")
    before = files_of(tmp_path / "run")
    write_tokens(text["train"], last=40)
    with pytest.raises(zoo.ZooError, match=r"task.train: changed since this run began"):
        train(tiny(task=text, steps=4), tmp_path / "run")
    assert files_of(tmp_path / "run") == before


def test_data_that_changes_while_a_run_goes_on_ends_it(tmp_path, text):
    """No checkpoint has seen the new data, and with the old data the run ends as one that was not interrupted."""
    config = tiny(task=text, steps=6, checkpoint_every=2)
    expected = train(config, tmp_path / "whole")
    with pytest.raises(zoo.ZooError, match=r"task.train: changed since this run began"):
        train(config, tmp_path / "run", report=lambda metrics: write_tokens(text["train"], last=40) if metrics["step"] == 3 else None)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000002"]
    write_tokens(text["train"], last=39)
    assert train(config, tmp_path / "run") == expected


def test_data_may_move_with_its_run(tmp_path, text):
    stopped(tiny(task=text, steps=4), tmp_path / "run")
    (tmp_path / "there").mkdir()
    settings = tmp_path / "run" / "train.yaml"
    for split in ("train", "test"):
        moved = str(tmp_path / "there" / f"{split}.npy")
        os.rename(text[split], moved)
        settings.write_text(settings.read_text().replace(text[split], moved))
        text[split] = moved
    train(tiny(task=text, steps=4), tmp_path / "run")


def test_a_model_that_has_changed_is_not_resumed(tmp_path):
    model = tmp_path / "model.yaml"
    fields = {"name": "own", "layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 16, "window": 6, "evict": "hard"}
    model.write_text(json.dumps({**fields, "loops": 2}))
    config = tiny(model=str(model), overrides={}, steps=4, task={"name": "cycle", "nodes": 6, "hops": 1})
    stopped(config, tmp_path / "run")
    before = files_of(tmp_path / "run")
    model.write_text(json.dumps({**fields, "loops": 3}))
    with pytest.raises(zoo.ZooError, match=r"run: model.loops: 3, but 2 when this run began"):
        train(config, tmp_path / "run")
    assert files_of(tmp_path / "run") == before
    model.write_text(json.dumps({**fields, "loops": 2}))
    train(config, tmp_path / "run")


def test_no_pickle_is_written(tmp_path):
    train(plan(muon_lr=0.01, dtype="bfloat16"), tmp_path / "run")
    endings = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert endings == {".yaml", ".json", ".jsonl", ".safetensors"}


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = zoo.create("gdn4", layers="gdn", d_model=16)
    run = RunFolder(tmp_path / "run", {"steps": 1})
    with run.locked(), pytest.raises(NotFiniteError, match="momentum/x is not finite after step 3"):
        run.save(model, {"momentum/x": torch.tensor([1.0, float("nan")])}, {"step": 3, "tokens": 9, "held_out_loss": 1.0}, keep=1)
    assert run.checkpoints() == []


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with pytest.raises(zoo.ZooError, match="stopped here"):
        train(plan(), tmp_path / "run", report=stop)
    with (tmp_path / "run" / "train.yaml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(zoo.ZooError, match="another process is training here"):
            train(plan(), tmp_path / "run")
    train(plan(), tmp_path / "run")


def stop(metrics):
    raise zoo.ZooError("stopped here")


def test_an_incomplete_line_of_metrics_is_dropped(tmp_path):
    run = RunFolder(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    run.trim_metrics(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'

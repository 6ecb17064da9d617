"""A run can be stopped at any moment, continued after its end, and resumed beside damaged files; nothing is lost unnoticed."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tests.zoo.training.tiny import tiny
from zoo.training.loop import train

ROOT = Path(__file__).parents[3]
FEW = {"train": 10, "process": 1}  # an ablation: test_ablation.py
MANY = {"train": 130, "process": 30, "ablate": 20, "torchrun": 12, "demo": 8}
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "zoo.yaml")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(FEW, id="few"),
        *(pytest.param({kind: count}, id=f"{count} of {kind}", marks=pytest.mark.extended) for kind, count in MANY.items()),
    ],
)
def test_interrupted_commands_end_as_uninterrupted_ones(tmp_path, wanted):
    """Also: no status 0, no traceback, no line of metrics overwritten, no process and no scratch file left."""
    module, counts = "tests.zoo.training.interruptions", [f"{kind}={count}" for kind, count in wanted.items()]
    done = subprocess.run(
        [sys.executable, "-m", module, tmp_path, "0", *counts],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["interruptions"] >= sum(wanted.values())
    assert not found["problems"], "\n".join(found["problems"])


def plan(**changes):
    return tiny(**{"steps": 6, "checkpoint_every": 2, "muon_lr": 0.02, **changes})


def fail_at(step):
    def report(metrics):
        if metrics["step"] == step:
            raise zoo.ZooError("stopped here")

    return report


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(run, other):
    ours, theirs = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An uninterrupted run, and one that failed after step 5 and has the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    train(plan(), folder / "whole")
    with pytest.raises(zoo.ZooError, match="stopped here"):
        train(plan(), folder / "failed", report=fail_at(5))
    assert sorted(path.name for path in (folder / "failed" / "checkpoints").iterdir()) == ["00000002", "00000004"]
    return folder


def flip(file, chance):
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file, chance):
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def zero(file, chance):
    file.write_bytes(bytes(file.stat().st_size))


def remove(file, chance):
    file.unlink()


@pytest.mark.parametrize("damage", [flip, cut, zero, remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_resumed(runs, tmp_path, capsys, name, damage):
    shutil.copytree(runs / "failed", run := tmp_path / "run")
    damage(run / "checkpoints" / "00000004" / name, random.Random(f"{name} {damage.__name__}"))
    resumed = []
    train(plan(), run, report=lambda metrics: resumed.append(metrics["step"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert "00000004" in line
    assert line.endswith(f"resuming from {run / 'checkpoints' / '00000002'}")
    assert resumed == [3, 4, 5, 6]
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert same(run, runs / "whole")
    assert (run / "checkpoints" / "damaged-00000004").is_dir()


def test_a_run_without_a_whole_checkpoint_is_refused(runs, tmp_path):
    shutil.copytree(runs / "failed", run := tmp_path / "run")
    for name in ("00000002", "00000004"):
        cut(run / "checkpoints" / name / "optimizer.safetensors", random.Random(0))
    with pytest.raises(zoo.ZooError, match="no whole checkpoint to resume from") as refused:
        train(plan(), run)
    assert len(str(refused.value).splitlines()) == 1
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_run_resumes_from_a_checkpoint_without_checksums(runs, tmp_path, capsys):
    shutil.copytree(runs / "failed", run := tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        progress = json.loads((checkpoint / "progress.json").read_text())
        del progress["sha256"]
        (checkpoint / "progress.json").write_text(json.dumps(progress))
        for name in FILES[:2]:
            save_file(load_file(checkpoint / name), checkpoint / name, metadata={"format": "pt"})
    train(plan(), run)
    assert capsys.readouterr().err == ""
    assert same(run, runs / "whole")


@pytest.mark.parametrize("damage", [b"\xff\xfe{}\n", b'{"loss": 1}\n', b'{"step": 3, "lo'])
def test_damaged_metrics_are_read_up_to_the_last_whole_line(runs, tmp_path, capsys, damage):
    shutil.copytree(runs / "failed", run := tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    train(plan(), run)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert ("line 6 is damaged" in capsys.readouterr().err) == damage.endswith(b"\n")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_model_is_refused(runs, tmp_path, seed):
    for name in ("model.safetensors", "zoo.yaml"):
        shutil.copy(runs / "whole" / name, tmp_path)
    chance = random.Random(seed)
    (flip if seed % 4 else cut)(tmp_path / "model.safetensors", chance)
    try:
        loaded, refused = zoo.load(tmp_path).state_dict(), ""
    except zoo.ZooError as error:
        loaded, refused = {}, str(error)
    if refused:
        assert len(refused.splitlines()) == 1
        assert str(tmp_path) in refused
    else:  # the bit was in the metadata
        whole = zoo.load(runs / "whole").state_dict()
        assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_a_bit_of_a_weight_is_noticed(tmp_path):
    zoo.save(zoo.create("gdn4", layers="gdn", d_model=16), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(zoo.ZooError, match=r"model.safetensors: damaged: its tensors do not match its zoo\.sha256"):
        zoo.load(tmp_path / "model")


def test_a_model_without_a_checksum_is_loaded(runs, tmp_path):
    shutil.copy(runs / "whole" / "zoo.yaml", tmp_path)
    save_file(load_file(runs / "whole" / "model.safetensors"), tmp_path / "model.safetensors")
    assert same(tmp_path, runs / "whole")
    zoo.load(tmp_path)


def test_a_finished_run_is_extended(runs, tmp_path):
    shutil.copytree(runs / "whole", run := tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    taken = []
    with pytest.raises(zoo.ZooError, match="stopped here"):
        train(plan(steps=10), run, report=fail_at(9))
    assert not (run / "results.json").exists()
    results = train(plan(steps=10), run, report=lambda metrics: taken.append(metrics["step"]))
    assert taken == [9, 10]  # from the checkpoint of step 8
    assert steps(run) == list(range(1, 11))
    assert (run / "metrics.jsonl").read_text().startswith(before)
    assert json.loads((run / "results.json").read_text())["loss"] == results["loss"]
    assert not same(run, runs / "whole")
    with pytest.raises(zoo.ZooError, match="finished"):
        train(plan(steps=10), run)
    with pytest.raises(zoo.ZooError, match=r"holds a run with steps: 10, not 8; a run can be extended .* but not shortened; resume"):
        train(plan(steps=8), run)


def test_a_run_that_has_not_finished_is_not_extended(runs, tmp_path):
    shutil.copytree(runs / "failed", run := tmp_path / "run")
    with pytest.raises(zoo.ZooError, match="holds a run with steps: 6, not 8"):
        train(plan(steps=8), run)

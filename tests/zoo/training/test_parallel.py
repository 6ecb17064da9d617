"""Two processes train the same weights as one, and one resumes a run of two or the other way round."""

import json
import os
import subprocess
import sys
from pathlib import Path

import catalogue
import pytest
import torch
from safetensors import safe_open

import zoo
from tests.zoo.training.many import BASE, CASES, STOP, half_asked, in_float32, plan, stopped
from zoo.training.loop import train
from zoo.training.parallel import Team

ROOT = Path(__file__).parents[3]
LAYOUTS = ("ddp", "fsdp")


def torchrun(*arguments, status=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of many.py: in one process, in two, and started in one and finished in two or the other way round."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*in_float32)
        half_asked()
        for case in CASES:
            train(plan(case, "ddp"), folder / "alone" / case)
        for how in LAYOUTS:
            assert f"stopped after step {STOP + 1} of 6" in stopped(folder / how / "begun alone", how)
        torchrun(ROOT / "tests" / "zoo" / "training" / "many.py", folder, "curves")
        for how in LAYOUTS:
            left = folder / how / "begun together" / "checkpoints" / "00000004"
            (folder / how / "left.json").write_text(json.dumps(sorted(str(p.relative_to(left)) for p in left.rglob("*"))))
            train(plan("muon", how), folder / how / "begun together")
    yield folder
    catalogue.REGISTRY.pop(("zoo", "tasks", "half-asked"))  # other tests do not see the task


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(run, alone, within=1e-5):
    found, expected = lines(run), lines(alone)
    assert [m["step"] for m in found] == list(range(1, 7))
    assert len({m["loss"] for m in found}) == 6
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=within)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=20 * within)
        assert a["by_level"].keys() == b["by_level"].keys()
        assert (a["tokens"], a["lr"]) == (b["tokens"], b["lr"])
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, alone)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=within)
    assert results[0]["answers"] == results[1]["answers"]
    trained = [zoo.load(folder).state_dict() for folder in (run, alone)]
    for name, tensor in trained[1].items():
        assert torch.allclose(trained[0][name], tensor, atol=20 * within), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", LAYOUTS)
def test_two_processes_equal_one(runs, how, case):
    same(runs / how / case, runs / "alone" / case, within=0.02 if case == "bfloat16" else 1e-5)


@pytest.mark.parametrize("begun", ["begun alone", "begun together"])
@pytest.mark.parametrize("how", LAYOUTS)
def test_a_run_resumes_in_another_number_of_processes(runs, how, begun):
    same(runs / how / begun, runs / "alone" / "muon")


@pytest.mark.parametrize("how", LAYOUTS)
def test_sigterm_to_one_process_stops_all_at_the_same_step(runs, how):
    said = [(runs / how / f"stopped-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert f"stopped after step {STOP + 1} of 6" in said[0]


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_checkpoint_has_the_same_files_and_no_pickle(runs, how):
    files = ["model.safetensors", "optimizer.safetensors", "progress.json", "zoo.yaml"]
    assert json.loads((runs / how / "left.json").read_text()) == files
    endings = {path.suffix for path in (runs / how).rglob("*") if path.is_file() and not path.name.startswith(("stopped", "left"))}
    assert endings == {".yaml", ".json", ".jsonl", ".safetensors", ".txt"}
    for file in ("model.safetensors", "optimizer.safetensors"):
        checkpoints = [run / "checkpoints" / "00000004" / file for run in (runs / how / "muon", runs / "alone" / "muon")]
        with safe_open(checkpoints[0], "pt") as found, safe_open(checkpoints[1], "pt") as expected:
            assert sorted(found.keys()) == sorted(expected.keys())
            for name in expected.keys():  # noqa: SIM118
                assert found.get_tensor(name).dtype == expected.get_tensor(name).dtype
                assert torch.allclose(found.get_tensor(name), expected.get_tensor(name), atol=2e-4), (file, name)


@pytest.mark.parametrize("how", LAYOUTS)
def test_rates_of_a_bfloat16_model_stay_float32(runs, how):
    with safe_open(runs / how / "bfloat16" / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {dtype for name, dtype in dtypes.items() if name.endswith(("norm.weight", "A_log", "dt_bias"))} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("proj.weight")} == {torch.bfloat16}


def test_one_process_that_dies_ends_the_other(tmp_path):
    done = torchrun(ROOT / "tests" / "zoo" / "training" / "many.py", tmp_path, "killed", status=1)
    assert "SIGKILL" in done.stderr
    assert len(lines(tmp_path / "killed")) == STOP


def test_the_command(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps({**BASE, "steps": 2, "parallel": "fsdp"}))
    done = torchrun("-m", "zoo", "train", tmp_path / "run.yaml", "--out", tmp_path / "run")
    assert done.stdout.count("written to") == done.stdout.count("step 2/2") == 1
    assert [m["step"] for m in lines(tmp_path / "run")] == [1, 2]


def test_a_batch_of_fewer_sequences_than_parts_is_refused(tmp_path, monkeypatch):
    class Three:
        def __enter__(self):
            return Team(torch.device("cpu"), 0, 3)

        def __exit__(self, *error):
            return False

    monkeypatch.setattr("zoo.training.loop.join", lambda device: Three())
    with pytest.raises(zoo.ZooError, match="batch_size: 5 sequences, fewer than 3 processes x accumulate 2"):
        train(plan("depo", "ddp").model_copy(update={"accumulate": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 3), (2, 5), (1, 4)])
def test_every_sequence_is_taken_and_every_rank_has_one(count, size):
    taken = [Team(torch.device("cpu"), rank, size).rows(count).tolist() for rank in range(size)]
    assert all(taken)
    assert {row for rows in taken for row in rows} == set(range(count))
    if count >= size:
        assert sum(map(len, taken)) == count

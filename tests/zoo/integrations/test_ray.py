"""Ablations on a Ray cluster of this machine. Needs `pip install '.[integrations]'`."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from click.testing import CliRunner

import zoo
from zoo.cli import main

pytestmark = pytest.mark.extended

PLAN = ["cycle-small", "base.steps=20", "base.batch_size=8", "base.eval_sequences=16", "seeds=[0, 1]", "match=[tokens]"]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """A Ray of two workers."""
    import ray  # a failure, not a skip, where it is not installed

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()


def ablate(*arguments, status=0):
    result = CliRunner().invoke(main, ["ablate", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result.output


def test_the_files_are_those_of_one_process(tmp_path):
    ablate(*PLAN, "--out", tmp_path / "here", "--processes", 1)
    said = ablate(*PLAN, "--out", tmp_path / "ray", "--on", "ray")
    assert said.count(": done") == 6
    for name in ("runs.csv", "table.md", "plan.yaml"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_runs_that_fail_are_named(tmp_path):
    plan = {"run": "cycle", "base": {"steps": 3, "batch_size": 4, "eval_sequences": 4}, "arms": {"good": {}, "bad": {"lr": 1e30}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "seeds": [0], "match": ["tokens"]}))
    result = CliRunner().invoke(main, ["ablate", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--on", "ray"])
    assert isinstance(result.exception, zoo.ZooError | SystemExit)
    assert "1 run failed" in result.output + str(result.exception)
    assert (tmp_path / "out" / "runs.csv").read_text().count("good") > 0


def test_ctrl_c_and_the_same_command_again(tmp_path, cluster):
    """Runs in progress write a checkpoint; the result is that of an uninterrupted ablation."""
    long = [*PLAN[:1], "base.steps=120", *PLAN[2:4], "seeds=[0]", "match=[tokens]"]
    command = [sys.executable, "-m", "zoo", "ablate", *long, "--out", str(tmp_path / "out"), "--on", "ray"]
    address = cluster.get_runtime_context().gcs_address
    process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    while not any(path.stat().st_size for path in (tmp_path / "out").glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 130, said
    assert "the same command resumes" in said
    assert list((tmp_path / "out").glob("runs/*/checkpoints/*"))
    assert not list((tmp_path / "out").glob("runs/*/results.json"))
    ablate(*long, "--out", tmp_path / "out", "--on", "ray")
    ablate(*long, "--out", tmp_path / "whole", "--processes", 2)
    assert (tmp_path / "out" / "runs.csv").read_bytes() == (tmp_path / "whole" / "runs.csv").read_bytes()

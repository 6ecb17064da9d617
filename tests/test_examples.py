"""The examples run as they are, from any folder."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import catalogue
import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
ELSEWHERE = ("sleep", "ray_serve")  # tested below, and in tests/zoo/integrations/test_ray_serve.py
LAST_LINE = {
    "fine_tune": "step 20: loss ",
    "many_streams": "sleeps: ",
    "new_mixer": "loss after 60 steps: 0.0",
    "sleep": "N = 16 [",
    "train_export_run": "onnxruntime answers [",
}


@pytest.mark.parametrize("example", [file for file in EXAMPLES if file.stem not in ELSEWHERE], ids=lambda file: file.stem)
def test_an_example_runs(example, tmp_path, monkeypatch, capsys):
    """In this process, which has imported torch."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    catalogue.REGISTRY.pop(("zoo", "blocks", "average"), None)  # other tests do not see the new mixer
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST_LINE[example.stem])
    assert list(tmp_path.iterdir()) == []


def test_an_example_is_a_program(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    example = next(file for file in EXAMPLES if file.stem == "sleep")
    result = subprocess.run([sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(LAST_LINE["sleep"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short(example):
    assert 20 <= len(example.read_text(encoding="utf-8").splitlines()) <= 40

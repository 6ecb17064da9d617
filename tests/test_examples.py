"""The examples run as they are, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LAST_LINE = {
    "fine_tune": "step 20: loss ",
    "many_streams": "sleeps: ",
    "new_mixer": "loss after 60 steps: 0.0",
    "sleep": "N = 16 [",
    "train_export_run": "onnxruntime answers [",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs(example, tmp_path):
    result = subprocess.run(
        [sys.executable, example],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(LAST_LINE[example.stem])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short(example):
    assert 20 <= len(example.read_text(encoding="utf-8").splitlines()) <= 40

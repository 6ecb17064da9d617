"""Damaged files of every kind that we read: no traceback, no hang, no memory beyond a bound, nothing accepted unnoticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="bounds memory by /proc")
@pytest.mark.parametrize(
    ("count", "words"),
    [
        (300, []),
        pytest.param(3_000, [], marks=pytest.mark.extended),
        pytest.param(1_000, ["ours"], marks=pytest.mark.extended),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, count, words):
    """Those that carry checksums are refused, or their content is whole; a run then resumes from an older checkpoint."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.zoo.mutations", tmp_path, str(count), str(count), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *problems, summary = done.stdout.splitlines()
    assert not problems, "\n".join(problems)
    assert int(summary.split()[0]) >= count

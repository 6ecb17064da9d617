"""Edits of the loop that is a sleep, each of which many tests in several files must notice."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EDITS = {
    "drop the carry": (
        "            if n and not self.config.carry and i in self.span:\n",
        "            if n and i in self.span:\n",
    ),
    "embed h again": (
        "h, first, fast, caches = one_pass(n, blocks, start, positions, h, first, *fast)",
        "h, first, fast, caches = one_pass(n, blocks, start, positions, first, first, *fast)",
    ),
    "skip the coda": (
        "        passes[-1] += [(i, True) for i in self.coda]\n",
        "        passes[-1] += [(i, True) for i in self.coda if not asleep]\n",
    ),
}
FILES = (
    "tests/zoo/test_sleep.py",
    "tests/zoo/test_fuzz.py",
    "tests/zoo/test_costs.py",
    "tests/zoo/checkpoints/test_families.py",
    "tests/zoo/sessions/test_session.py",
    "tests/export/test_parity.py",
)


@pytest.mark.extended
@pytest.mark.parametrize("edit", EDITS)
def test_tests_notice_an_edit_of_the_loop(edit, tmp_path):
    """At least ten tests, in at least three files, fail."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
    old, new = EDITS[edit]
    text = (copy / "zoo/model.py").read_text()
    assert text.count(old) == 1
    (copy / "zoo/model.py").write_text(text.replace(old, new))
    failed: list[str] = []
    for file in FILES:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=10", file]
        done = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True)
        failed += re.findall(r"^(?:FAILED|ERROR) ([^:]+)::", done.stdout, re.MULTILINE)
        if len(failed) >= 10 and len(set(failed)) >= 3:
            return
    pytest.fail(f"{len(failed)} tests failed, in {sorted(set(failed))}")

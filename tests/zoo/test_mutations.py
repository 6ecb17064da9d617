"""Damaged files of every kind that we read: no traceback, no hang, no memory beyond a bound, nothing run or accepted unnoticed."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

from tests.zoo import mutations
from tests.zoo.mutations import find
from tests.zoo.readable import ORACLES, Kind, make

FEW = ("gdn-qwen3_5-a", "jet-nemotron-a", "llama-swa-a", "mamba2-a", "ouro-a", "samba-a")
ALL = tuple(sorted(path.parent.name for path in ORACLES.glob("*/config.json")))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="bounds memory by /proc")
@pytest.mark.parametrize(
    ("oracles", "count", "seed"),
    [
        (FEW, 270, 0),
        pytest.param(ALL, 2_700, 1, marks=pytest.mark.extended),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, oracles, count, seed):
    """Or their content is whole, where it has a checksum, and finite in any case; a run then resumes from an older checkpoint."""
    problems = find(make(tmp_path, oracles), tmp_path, count, seed)
    assert not problems, "\n".join(problems)


@pytest.mark.extended
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="bounds memory by /proc")
def test_all_damage_to_our_files_is_noticed(tmp_path):
    kinds = [kind for kind in make(tmp_path, ()) if kind.ours]
    problems = find(kinds, tmp_path, 900, 3)
    assert not problems, "\n".join(problems)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="bounds memory by /proc")
@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda file: int(file.read_bytes()[:1].hex()[:1] + "x"), "builtins.ValueError"),
        (lambda file: pickle.loads(file.read_bytes()), "code was executed"),
        (lambda file: bytearray(3 * 2**30), "builtins.MemoryError"),
        (lambda file: [None for _ in iter(int, 1)], "takes more than"),
        (lambda file: print("a\nb", file=sys.stderr), "prints 2 lines"),
        (lambda file: torch.tensor([file.stat().st_size]), "accepted"),
    ],
)
def test_careless_readers_are_found(tmp_path, monkeypatch, read, found):
    monkeypatch.setattr(mutations, "SECONDS", 0.2)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_bytes(b"1234")
    kind = Kind("x", "file", lambda folder: [read(folder / "file")], "pickle", ours=found == "accepted")
    problems = find([kind], tmp_path, 40 if kind.ours or "code" in found else 1, 0)
    assert any(found in problem for problem in problems), problems

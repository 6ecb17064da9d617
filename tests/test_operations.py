"""Operator counts of a token and of a sleep: a change that adds operators fails here on any machine."""

from __future__ import annotations

import json

import pytest

from benchmarks.operations import COMMITTED, count


@pytest.fixture(scope="module")
def now() -> dict[str, dict[str, int]]:
    return count()


def test_every_model_is_counted(now):
    assert now.keys() == json.loads(COMMITTED.read_text()).keys()


@pytest.mark.parametrize("what", ["token", "sleep"])
def test_operators_within_five_percent(now, what):
    """After an intended change, run `python -m benchmarks.operations --write` and commit the file."""
    committed = json.loads(COMMITTED.read_text())
    assert {layers: counts[what] for layers, counts in now.items()} == {
        layers: pytest.approx(counts[what], rel=0.05) for layers, counts in committed.items()
    }

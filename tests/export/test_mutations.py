"""Damaged bundles, whether the manifest has the checksums of the whole files or of the damaged ones."""

from pathlib import Path

import pytest

from tests.zoo.mutations import find
from tests.zoo.readable import make_bundle


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="bounds memory by /proc")
@pytest.mark.parametrize("count", [30, pytest.param(400, marks=pytest.mark.extended)])
def test_damaged_bundles_are_refused_in_one_line(tmp_path, bundles, count):
    problems = find(make_bundle(tmp_path, bundles("hard").folder), tmp_path, count, count)
    assert not problems, "\n".join(problems)

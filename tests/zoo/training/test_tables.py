"""Tables of an ablation: labels and alignment."""

from unittest.mock import Mock

import pytest

from zoo.training.tables import aligned, level_label, markdown


@pytest.mark.parametrize(
    ("level", "name", "label"),
    [(1, "hops", "1 hop"), (2, "hops", "2 hops"), (1, "windows ago", "1 window ago"), (3, "windows ago", "3 windows ago"),
     (1, "window", "window 1"), (2, "level", "level 2")],
)  # fmt: skip
def test_labels_of_levels(level, name, label):
    assert level_label(level, name) == label


ROWS = [
    ["arm", "steps", *(f"{hops} hops" for hops in range(2, 9))],
    *([f"arm {i}", "1,000", *["99.3% (98.1-100.0)"] * 7] for i in range(16)),
]


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_columns_arealigned():
    lines = aligned(ROWS)
    assert len({len(line) for line in lines}) == 1
    head, rule, *rest = cells(lines)
    assert [head, *rest] == ROWS
    assert all(set(cell) <= set("-:") for cell in rule)


def test_columns_of_levels_are_in_order():
    """Whichever levels the first run has."""
    common = {"level_name": "hops", "wrong_window": None, "exact_chance": None, "answers": 9}
    first, second = Mock(seed=0), Mock(seed=1)
    results = {first: common | {"by_level": {2: 0.5}}, second: common | {"by_level": {1: 1.0, 2: 0.5, 3: 0.1}}}
    lines = markdown(Mock(match="flops", times=1), results, [], "one", [0, 1]).splitlines()
    head, *_ = cells([line for line in lines if line.startswith("|")])
    assert [name for name in head if "hop" in name] == ["1 hop", "2 hops", "3 hops"]

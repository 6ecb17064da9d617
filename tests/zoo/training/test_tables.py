"""Tables of an ablation: labels, alignment, and folding to a width."""

import pytest

from zoo.training.tables import _aligned, fold, level_label


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


def test_columns_are_aligned():
    lines = _aligned(ROWS)
    assert len({len(line) for line in lines}) == 1
    head, rule, *rest = cells(lines)
    assert [head, *rest] == ROWS
    assert all(set(cell) <= set("-:") for cell in rule)


@pytest.mark.parametrize("width", [80, 40, 10])
def test_a_folded_table_fits_and_loses_nothing(width):
    text = "\n".join(["## Title", "", *_aligned(ROWS), "", "a footnote that is longer than ten columns", ""])
    folded = fold(text, width).splitlines()
    table = [line for line in folded if line.startswith("|")]
    assert all(len(line) <= max(width, 33) for line in table)  # 33: the first column and one more
    height = len(ROWS) + 1
    parts = [cells(table[i : i + height]) for i in range(0, len(table), height)]
    assert [row[0] for row in parts[0]] == [row[0] for row in parts[-1]]
    joined = [[parts[0][i][0], *(cell for part in parts for cell in part[i][1:])] for i in range(height)]
    assert [joined[0], *joined[2:]] == ROWS
    assert [line for line in folded if line and not line.startswith("|")] == ["## Title", "a footnote that is longer than ten columns"]
    assert fold(text, 1000) == text

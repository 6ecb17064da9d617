"""Accuracy against training FLOPs: the price of an accuracy, and the table of an ablation with several budgets."""

import math

import pytest

from tests.zoo.training.tiny import TINY
from zoo.training.ablation import ablate
from zoo.training.plan import Plan
from zoo.training.scaling import flops_to_reach


def test_the_price_of_an_accuracy():
    """An accuracy that is a straight line in log2 FLOPs, on which the mean of two seeds lies."""
    curve = {2**k * 10**12: [0.1 * k - 0.05, 0.1 * k + 0.05] for k in (6, 7, 8)}
    assert flops_to_reach(curve, 0.65) == pytest.approx(2**6.5 * 10**12)
    assert flops_to_reach(curve, 0.78) == pytest.approx(2**7.8 * 10**12)
    assert flops_to_reach(curve, 0.59) == 0
    assert math.isinf(flops_to_reach(curve, 0.81))
    assert flops_to_reach({1: [0.2], 2: [0.95], 4: [0.5]}, 0.9) == pytest.approx(2 ** (0.7 / 0.75))  # the first time


def test_several_budgets_are_compared_in_one_table_and_plot(tmp_path):
    base = {**TINY, "model": "gdn4-sleep2-hard5", "task": {"name": "cycle", "nodes": 5, "hops": 2}, "steps": 4, "eval_sequences": 8}
    plan = Plan(
        base=base,
        grid={"overrides.loops": [1, 4]},
        seeds=(0,),
        match=("flops",),
        budgets=({"times": 1}, {"times": 2, "arms": ("N=4",)}),
        reference="N=4",
    )
    last = ablate(plan, tmp_path / "ablation", processes=1).split("\n## ")[-1]
    assert last.startswith("First answers, 2 hops against training FLOPs")
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in last.splitlines() if line.startswith("|")]
    assert header == ["arm", "parameters", "FLOPs per token awake", "1x", "2x", "FLOPs to 90%"]
    assert [row[0] for row in rows] == ["N=1", "N=4"]
    assert [bool(row[4]) for row in rows] == [False, True]  # N=1 has the first budget only
    assert all(row[5].startswith(">") for row in rows)  # five nodes are not learned in eight steps
    assert (tmp_path / "ablation" / "scaling.png").stat().st_size > 10_000

"""The weights that come with the package answer as their cards say."""

import re

import pytest
import torch

import zoo
from zoo.factory import WEIGHTS
from zoo.tasks import tasks
from zoo.training.evaluate import evaluate

NAMES = ["cycle2-sleep1", "cycle2-sleep4"]


def test_every_folder_is_tested():
    assert sorted(folder.name for folder in WEIGHTS.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_that_of_the_card(name):
    """The card's table has a row for each number of passes: the accuracy of the first answer at 1 to 6 hops."""
    card = (WEIGHTS / name / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|((?: [.\d]+ \|){6})$", card, re.MULTILINE)
    assert [int(loops) for loops, _ in rows] == [1, 2, 4, 8]
    model, task = zoo.create(name, pretrained=True), tasks.get("cycle")(nodes=12, hops=6, joint=True, questions=18)
    for loops, stated in rows:
        found = evaluate(model, task, 2048, loops=int(loops))["first_by_level"]
        # a tie may be broken differently on another CPU
        assert [found[hops] for hops in range(1, 7)] == pytest.approx([float(x) for x in stated.split(" |")[:-1]], abs=0.01)


def test_four_passes_follow_six_hops_where_one_does_not():
    """Questions about a window that was evicted, as in the README."""
    window = torch.tensor([[3, 9, 7, 6, 5, 11, 10, 4, 1, 2, 8, 0]])
    answers = torch.arange(12)
    for _ in range(6):
        answers = window[0, answers]
    questions = 72 + torch.arange(12)[:, None]

    def right(name, **fields):
        model = zoo.create(name, pretrained=True, **fields)
        state = model.consolidate(window.expand(12, -1))
        return int((model(questions, state).logits[:, -1].argmax(-1) == answers).sum())

    assert right("cycle2-sleep4") >= 10
    assert right("cycle2-sleep1") <= 8
    assert right("cycle2-sleep4", loops=1) <= 4


@pytest.mark.parametrize("name", ["cycle2", "cycle2-sleep2", "cycle2-sleep4-slide12"])
def test_other_suffixes_say_which_weights_there_are(name):
    with pytest.raises(zoo.ZooError, match=r"pretrained: there are weights for cycle2-sleep1, cycle2-sleep4; `loops` changes"):
        zoo.create(name, pretrained=True)


def test_another_architecture_is_refused():
    with pytest.raises(zoo.ZooError, match="d_model"):
        zoo.create("cycle2-sleep4", pretrained=True, d_model=32)

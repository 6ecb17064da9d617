"""gsm-infinite: labels against a solver that reads the text, what the text gives away, tokenizers and files."""

import json
import re
from collections import Counter

import numpy as np
import pytest

import zoo
from zoo.config import validate
from zoo.tasks import new_task
from zoo.training.config import TrainConfig
from zoo.training.loop import train

SMALL = {"name": "gsm-infinite", "operations": 3, "shortest": 130, "longest": 180, "width": 140}
NAME = r"number of (\w+ in \w+)"


def text_of(task, row):
    """What the words of a sequence say."""
    return " ".join(task.text.words[i] for i in row if i)


def facts_of(text):
    """Each quantity's number, or its operation and operands."""
    facts = {}
    for said in re.findall(r"The number [^.]*\.", text):
        number = re.fullmatch(rf"The {NAME} equals (\d+) ?\.", said)
        operation = re.fullmatch(rf"The {NAME} equals the (\w+) of the {NAME} and the {NAME} ?\.", said)
        assert number or operation, said
        name, *rest = (number or operation).groups()
        assert name not in facts
        facts[name] = int(rest[0]) if number else rest
    return facts


def solve(facts, asked):
    """Value, and the quantities that it takes."""
    if isinstance(facts[asked], int):
        return facts[asked], {asked}
    word, *names = facts[asked]
    (a, of_a), (b, of_b) = (solve(facts, name) for name in names)
    return {"sum": a + b, "difference": a - b, "product": a * b}[word], {asked} | of_a | of_b


def read(text):
    asked, rest, answer = re.fullmatch(r"Question ?: How many (\w+ are in \w+) ?\? Problem ?: (.*) Answer ?: (\d+)", text).groups()
    return asked.replace(" are", ""), facts_of(rest), int(answer)


@pytest.mark.parametrize(("fields", "count"), [(SMALL, 10_000), ({"name": "gsm-infinite"}, 150)], ids=["small", "full length"])
def test_labels(fields, count):
    task = new_task(fields)
    ids, mask, level = task.batch(0, 0, count)
    assert ids.shape == (count, task.longest)
    assert np.array_equal(mask, level > 0)
    assert mask.sum() == mask[:, -1].sum() == count
    lengths, needed, first = [], [], []
    for row, operations in zip(ids, level[:, -1], strict=True):
        asked, facts, answer = read(text_of(task, row))
        value, takes = solve(facts, asked)
        assert answer == value
        assert sum(not isinstance(facts[name], int) for name in takes) == operations
        assert all(0 <= solve(facts, name)[0] <= 99 for name in takes)
        lengths.append((row != 0).sum())
        assert (row[: -lengths[-1]] == 0).all()
        needed.append(len(takes) / len(facts))
        first.append(np.mean([list(facts).index(name) / max(1, len(facts) - 1) for name in takes]))
    assert task.shortest - 30 < min(lengths) <= max(lengths) <= task.longest
    assert np.mean(lengths) == pytest.approx((task.shortest + task.longest) / 2 - 12, abs=6 if count > 1000 else 60)
    counts = np.bincount(level[:, -1], minlength=task.operations + 1)[1:] / count
    assert np.abs(counts - 1 / task.operations).max() < (0.02 if count > 1000 else 0.1)
    assert np.mean(first) == pytest.approx(0.5, abs=0.03)  # what matters stands anywhere
    if count < 1000:
        assert max(needed) < 0.2


def test_graphs_differ_in_depth():
    """Eight operations are neither always a chain nor always a balanced tree, and results are used again."""
    task = new_task({"name": "gsm-infinite"})

    def depth(facts, name):
        return 0 if isinstance(facts[name], int) else 1 + max(depth(facts, other) for other in facts[name][1:])

    depths, again = Counter(), 0
    ids, _, level = task.batch(1, 0, 150)
    for row in ids[level[:, -1] == 8]:
        asked, facts, _ = read(text_of(task, row))
        depths[depth(facts, asked)] += 1
        used = Counter(name for taken in solve(facts, asked)[1] if not isinstance(facts[taken], int) for name in facts[taken][1:])
        again += max(used.values()) > 1
    assert min(depths) <= 5
    assert max(depths) >= 7
    assert again > 2


def test_the_last_window_gives_nothing_away():
    """It does not hold the question, and to pick one of the quantities that it settles is no better than the best blind guess."""
    task = new_task({"name": "gsm-infinite"})
    ids, _, _ = task.batch(0, 0, 150)
    start = (task.longest - 1) // task.width * task.width
    hits = []
    for row in ids:
        text = text_of(task, row[start:])
        assert "Question" not in text
        facts = facts_of(text)
        settled = []
        for name in facts:
            try:
                settled.append(solve(facts, name)[0])
            except KeyError:
                continue
        answer = read(text_of(task, row))[2]
        hits.append(np.mean([value == answer for value in settled]))
    assert np.mean(hits) < task.chance() + 0.05


def test_chance_by_counting():
    task = new_task(SMALL)
    answers = task.batch(3, 0, 5000).ids[:, -1]
    assert np.bincount(answers).max() / len(answers) == pytest.approx(task.chance(), abs=0.01)
    assert task.chance() == task.exact_chance()


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    task = new_task(SMALL)
    made.train_from_iterator(
        [text_of(task, row) for row in task.batch(0, 0, 50).ids], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return made


def test_lengths_are_those_of_the_tokenizer(tokenizer, tmp_path):
    task = new_task({**SMALL, "tokenizer": str(tmp_path / "tokenizer.json"), "shortest": 250, "longest": 320, "width": 280})
    ids, mask, level = task.batch(0, 0, 200)
    assert task.vocab_size == tokenizer.get_vocab_size()
    end = tokenizer.token_to_id("<|endoftext|>")
    several = 0
    for row, supervised, operations in zip(ids, mask, level, strict=True):
        told = [token for token in row if token != end]
        assert task.shortest - 60 < len(told) < 320
        asked, facts, answer = read(tokenizer.decode(told))
        assert answer == solve(facts, asked)[0]
        assert row[-1] == end
        assert tokenizer.decode(row[supervised]) == f" {answer}"
        assert len(set(operations[supervised])) == 1
        several += supervised.sum() > 2
    assert several or tokenizer.token_to_id("Ġ99") is not None
    assert 0.3 < task.chance() < 0.9  # of two tokens the end is sure


UPSTREAM = {
    "problem": "The number of adult owl in Pine Ridge equals 3. The number of adult crow in Pine Ridge equals 2.",
    "question": "What is the total number of adult animals in Pine Ridge?",
    "solution": "Define adult owl in Pine Ridge as x; so x = 3. [...] Answer: 5.",
    "op": 4,
    "id": 1,
    "template": "crazy_zootopia",
    "mode": "normalforward",
    "length": "8k",
    "d": 2,
}


def write(path, *problems):
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return str(path)


def test_files_of_the_source(tmp_path):
    long = {**UPSTREAM, "problem": 50 * UPSTREAM["problem"]}
    other = {**UPSTREAM, "solution": "Answer: 12.", "op": 2}
    files = {"train": write(tmp_path / "a.jsonl", UPSTREAM, other, long), "test": write(tmp_path / "b.jsonl", other)}
    task = new_task({"name": "gsm-infinite", "shortest": 200, "longest": 260, "width": 160, **files})
    ids, mask, level = task.batch(0, 0, 40)
    found = set()
    for row, supervised, operations in zip(ids, mask, level, strict=True):
        text = bytes(row[row != 0].tolist()).decode()
        answer, op = (" 5", 4) if operations[-1] == 4 else (" 12", 2)
        assert text == f"Question: {UPSTREAM['question']} Problem: {UPSTREAM['problem']} Answer:{answer}"
        assert bytes(row[supervised].tolist()).decode() == f"{answer}\0"
        assert set(operations[supervised]) == {op}
        found.add(op)
    assert found == {2, 4}
    assert set(task.batch(0, 0, 5, "test").level[:, -1]) == {2}
    assert task.exact_chance() == task.chance() == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"longest": 2010}, "longest: 2010 leaves 10 tokens for the last window of 2000"),
        ({"shortest": 1200}, "shortest: 1200: want more than the 1300 tokens of the last window"),
        ({"shortest": 3400}, "at most longest"),
        ({"operations": 60}, "operations: the facts of 60 may not fit into 2000 tokens"),
        ({"train": "a.jsonl"}, "train, test: want both files"),
        ({"train": "a.jsonl", "test": "./a.jsonl"}, "test: ./a.jsonl is also the file to train on"),
        ({"train": "a.jsonl", "test": "b.jsonl"}, "a.jsonl: cannot be read"),
        ({"tokenizer": "none.json"}, "tokenizer: none.json: cannot be read"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(zoo.ZooError, match=message):
        new_task({"name": "gsm-infinite", **fields})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a problem"),
        (json.dumps({**UPSTREAM, "solution": "no"}), "no 'Answer"),
        (json.dumps([1]), "line 2: not a problem"),
        (json.dumps({"problem": "x"}), "line 2: not a problem.*question"),
    ],
)
def test_broken_files(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(UPSTREAM) + "\n" + line + "\n")
    files = {"train": str(tmp_path / "a.jsonl"), "test": write(tmp_path / "b.jsonl", UPSTREAM)}
    with pytest.raises(zoo.ZooError, match=message):
        new_task({"name": "gsm-infinite", **files})


def test_an_end_that_is_no_token(tokenizer, tmp_path):
    with pytest.raises(zoo.ZooError, match="end: '</s>' is not a token"):
        new_task({**SMALL, "tokenizer": str(tmp_path / "tokenizer.json"), "end": "</s>"})


@pytest.mark.parametrize("evict", ["hard", "slide"])
def test_it_trains(tmp_path, evict):
    task = {**SMALL, "operations": 1, "shortest": 60, "longest": 80, "width": 30}
    plan = {
        "model": f"gdn4-sleep2-{evict}30",
        "overrides": {"layers": "attn gdn", "d_model": 16},
        "task": task,
        "steps": 2,
        "batch_size": 4,
    }
    results = train(validate(TrainConfig, {**plan, "eval_sequences": 4}, "test"), tmp_path / "run")
    assert results["level_name"] == "operations"
    assert results["answers"] == 4

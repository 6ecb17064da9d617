"""gsm-infinite: labels and distributions against a solver that reads only the text, the layout, tokenizers and files."""

import json
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

import zoo
from zoo.config import validate
from zoo.tasks import gsm_graph, new_task
from zoo.tasks.gsm_words import GROUPS, NAMES, question, sentence
from zoo.training.config import TrainConfig
from zoo.training.loop import train

SMALL = {"name": "gsm-infinite", "operations": 4, "quantities": 4, "shortest": 260, "longest": 360, "width": 200}
QUANTITY = r"the (?:total )?number of \w+ in \w+"
UNKNOWN = "unknown"


def text_of(task, row):
    """What the words of a sequence say."""
    return " ".join(task.text.words[i] for i in row if i)


def read(text):
    """The quantity asked for, the facts, and the answer. A fact is a quantity, a number or None, times or plus, and signed operands."""
    asked, rest, *answer = re.fullmatch(rf"Question ?: What is ({QUANTITY}) ?\? Problem ?: (.*?)(?: Answer ?: (\d+))?", text).groups()
    facts = []
    for said in re.findall(r"The [^.]*\.", rest):
        name = re.match(QUANTITY, "t" + said[1:])[0]
        meaning = said[len(name) :].strip(" .")
        if re.fullmatch(r"exists ?, and is greater than 0", meaning):
            facts.append((name, UNKNOWN, "plus", []))
            continue
        number, joined, operands = re.fullmatch(rf"equals(?: (\d+))?(?: (plus|times))?(?: (.*{QUANTITY}.*))?", meaning).groups()
        names = re.findall(QUANTITY, operands or "")
        shape = re.sub(QUANTITY, "Q", operands or "").replace(" ,", ",")
        assert shape in (
            "",
            "Q",
            "the sum of Q and Q",
            "the difference between Q and Q",
            "the sum of Q, Q and Q",
            "the sum of Q, Q, Q and Q",
        )
        signs = [1, -1] if "difference" in shape else [1] * len(names)
        facts.append((name, int(number) if number else None, joined or "plus", list(zip(signs, names, strict=True))))
    return asked, facts, int(answer[0]) if answer[0] else None


class Reader:
    """Solve a problem from its text. A total is the sum over all kinds that are mentioned for the place. Values are linear in the
    quantity that is asked for."""

    def __init__(self, text):
        self.asked, self.facts, _ = read(text)
        mentioned = {self.asked, *(name for name, *_ in self.facts), *(name for *_, terms in self.facts for _, name in terms)}
        self.rules, self.given = {}, None
        for name in mentioned:
            if name.startswith("the total"):
                place = name.split()[-1]
                kinds = [other for other in mentioned if other.split()[-1] == place and not other.startswith("the total")]
                self.rules[name] = (None, "plus", [(1, kind) for kind in kinds])
        for name, number, joined, terms in self.facts:
            if name in self.rules and not terms and number != UNKNOWN:
                self.given = name, number
            else:
                if name in self.rules:  # the other one came first
                    self.given = name, self.rules[name][0]
                self.rules[name] = (number, joined, terms)
        self.reverse = any(number == UNKNOWN for _, number, *_ in self.facts)
        self.final = self.given[0] if self.given else self.asked
        self.needed = {}
        self.visit(self.final)

    def visit(self, name):
        if name not in self.needed:
            self.needed[name] = None
            number, joined, terms = self.rules[name]
            below = [(sign, self.visit(other)) for sign, other in terms]
            value, slope, depth = (
                sum(s * v for s, (v, _, _) in below),
                sum(s * d for s, (_, d, _) in below),
                max([d + 1 for _, (*_, d) in below], default=0),
            )
            if number == UNKNOWN:
                slope = 1
            elif joined == "times":
                value, slope = number * value, number * slope
            else:
                value += number or 0
            self.needed[name] = value, slope, depth
        assert self.needed[name] is not None, "a cycle"
        return self.needed[name]

    @property
    def answer(self):
        value, slope, _ = self.needed[self.final]
        return Fraction(self.given[1] - value, slope) if self.reverse else value

    @property
    def operations(self):
        """Edges of the graph that is needed; a bare number counts as one."""
        return sum(max(1, len(terms) + (number not in (None, UNKNOWN))) for number, _, terms in (self.rules[name] for name in self.needed))

    @property
    def steps(self):
        """Operations on two numbers."""
        rules = (self.rules[name] for name in self.needed)
        return sum(max(0, len(terms) - 1 + (number not in (None, UNKNOWN))) if terms else 0 for number, _, terms in rules)

    @property
    def depth(self):
        return self.needed[self.final][2]


def drawn(operations, count, seed=0):
    """Texts of problems without irrelevant facts, and the answers that the generator knows."""
    dice = random.Random(seed)
    for _ in range(count):
        problem = gsm_graph.draw(dice, operations, 20, NAMES, GROUPS)
        yield f"{question(problem.asked)} Problem: {' '.join(map(sentence, problem.facts))}", problem


def distributions(count):
    """Check `count` problems for each of 2, 4, 6 and 8 operations. Returns the means over forward problems, and majorities."""
    found = {}
    for operations in (2, 4, 6, 8):
        readers, answers = [], {False: Counter(), True: Counter()}
        for text, problem in drawn(operations, count, seed=operations):
            reader = Reader(text)
            assert (reader.answer, reader.operations, reader.reverse) == (problem.answer, operations, problem.reverse)
            answers[reader.reverse][reader.answer] += 1
            if not reader.reverse:
                readers.append(reader)
        found[operations] = {
            "forward": max(answers[False].values()) / answers[False].total(),
            "reverse": max(answers[True].values()) / answers[True].total(),
            "share reverse": answers[True].total() / count,
            "steps": np.mean([reader.steps for reader in readers]),
            "depth": np.mean([reader.depth for reader in readers]),
        }
    return found


@pytest.mark.parametrize(("count", "slack"), [(250, 3.0), pytest.param(5000, 1.0, marks=pytest.mark.extended)])
def test_distributions_of_upstream(count, slack):
    """Upstream's generator at its medium setting: majorities of 2,000 to 3,000 forward problems each. Of its reverse problems, whose
    answers are 1 to 4, about a hundred each gave .32, .30, .33 and .34, which as the largest of four shares of a small sample is too
    much. Few problems of ours get three times the tolerance."""
    found = distributions(count)
    for operations, forward, reverse, steps in ((2, 0.30, 0.31, 0.0), (4, 0.25, 0.30, 1.0), (6, 0.15, 0.30, 2.1), (8, 0.11, 0.30, 3.0)):
        assert found[operations]["forward"] == pytest.approx(forward, abs=0.03 * slack)
        assert found[operations]["reverse"] == pytest.approx(reverse, abs=0.03 * slack)
        assert found[operations]["share reverse"] == pytest.approx(0.5, abs=0.03 * slack)
        assert found[operations]["steps"] == pytest.approx(steps, abs=0.2 * slack)
    assert found[8]["depth"] == pytest.approx(3.3, abs=0.3 * slack)


@pytest.mark.parametrize(
    ("fields", "count"), [(SMALL, 160), ({"name": "gsm-infinite"}, 60), ({**SMALL, "width": 90, "shortest": 190, "longest": 440}, 100)]
)
def test_sequences(fields, count):
    """Labels, lengths, padding and levels, from the text alone."""
    task = new_task(fields)
    lengths, operations, relations = [], [], Counter()
    for step in range(4):
        ids, mask, level = task.batch(0, step, count // 4)
        assert ids.shape == (count // 4, task.longest)
        assert np.array_equal(mask, level > 0)
        ends = mask.argmax(axis=1)
        assert len(set(ends // task.width)) == 1  # every problem of a batch ends in the same window
        assert ends[0] // task.width > 0
        assert (ends % task.width > 0).all()  # nothing predicts the first token after a sleep
        for row, end, levels in zip(ids, ends, level, strict=True):
            assert row[: end + 1].all()
            assert not row[end + 1 :].any()
            assert np.flatnonzero(levels).tolist() == [end]
            text = text_of(task, row)
            reader = Reader(text)
            assert read(text)[2] == reader.answer
            assert reader.operations == levels[end]
            lengths.append(end + 1)
            operations.append(reader.operations)
            for _, number, _, terms in reader.facts:
                minus = len(terms) == 2 and terms[1][0] < 0
                relations["copy" if len(terms) == 1 and number is None else "difference" if minus else "sum" if terms else "number"] += 1
    assert task.shortest <= min(lengths) <= max(lengths) <= task.longest
    assert set(operations) <= set(range(2, task.operations + 1))
    if count == 60:
        share = {relation: times / relations.total() for relation, times in relations.items()}
        assert share["copy"] == pytest.approx(0.44, abs=0.04)
        assert share["sum"] == pytest.approx(0.26, abs=0.04)
        assert share["difference"] == pytest.approx(0.26, abs=0.04)


def test_lengths_and_operations_are_even():
    task = new_task(SMALL)
    level = np.concatenate([task.batch(0, step, 300).level for step in range(2)])
    lengths, operations = level.argmax(axis=1) + 1, level.max(axis=1)
    assert np.mean(lengths) == pytest.approx((260 + 360) / 2, abs=8)
    assert np.abs(np.bincount(operations)[2:] / 600 - 1 / 3).max() < 0.08


def test_no_problem_is_in_both_splits(monkeypatch):
    """Of 200 problems that are drawn again and again, with other irrelevant facts each time."""
    dice = random.Random(0)
    pool = [gsm_graph.draw(dice, 2, SMALL["quantities"], NAMES, GROUPS) for _ in range(200)]
    monkeypatch.setattr(gsm_graph, "draw", lambda dice, *_: dice.choice(pool))
    task = new_task(SMALL)

    def words(text):
        return " ".join(task.text.words[i] for i in task.text.encode(text))

    facts = [{words(question(problem.asked)), *(words(sentence(fact)) for fact in problem.facts)} for problem in pool]
    found = {}
    for split in ("train", "test"):
        texts = [text_of(task, row) for step in range(4) for row in task.batch(0, step, 64, split).ids]
        shown = [{i for i, parts in enumerate(facts) if all(part in text for part in parts)} for text in texts]
        assert all(shown)
        found[split] = set().union(*shown)
    assert not found["train"] & found["test"]
    assert len(found["train"]) > 100 > len(found["test"]) > 4


def test_what_the_paper_evicts_is_evicted():
    """2,000 of 2,008 to 3,300 tokens; most facts that a problem needs are among them."""
    mask = new_task({"name": "gsm-infinite"}).batch(0, 0, 60).loss_mask
    shares = 2000 / (mask.argmax(axis=1) + 1)
    assert np.mean(shares) == pytest.approx(np.mean([2000 / n for n in range(2008, 3301)]), abs=0.05)
    assert min(shares) > 0.6


def test_irrelevant_facts_have_names_of_their_own():
    """None is needed, and no quantity that is needed depends on one."""
    task = new_task({"name": "gsm-infinite"})
    ids, _, _ = task.batch(1, 0, 20)
    for row in ids:
        reader = Reader(text_of(task, row))
        needed = [name.split() for name in reader.needed]
        places = Counter(name.split()[-1] for name, *_ in reader.facts)
        assert len(places) > 5
        assert not {name[-1] for name in needed} & {place for place, times in places.items() if times > 6}


def test_chance_by_counting():
    task = new_task(SMALL)
    answers = task.contexts(np.random.default_rng(3), 600)[:, -1, 1]
    assert np.bincount(answers).max() / len(answers) == pytest.approx(task.chance(), abs=0.04)
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
    task = new_task({**SMALL, "tokenizer": str(tmp_path / "tokenizer.json"), "shortest": 450, "longest": 620, "width": 400})
    ids, mask, level = task.batch(0, 0, 100)
    assert task.vocab_size == tokenizer.get_vocab_size()
    end = tokenizer.token_to_id("<|endoftext|>")
    for row, supervised, operations in zip(ids, mask, level, strict=True):
        real = [token for token in row if token != end]
        assert 450 <= len(real) + 1 <= 620
        assert row[len(real)] == end
        reader = Reader(text := tokenizer.decode(real))
        assert read(text)[2] == reader.answer
        assert tokenizer.decode(row[supervised][:-1]) == f" {reader.answer}"
        assert row[supervised][-1] == end
        assert np.flatnonzero(supervised)[0] > 400
        assert set(operations[supervised]) == {reader.operations}
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


def text_length(problem):
    return len(f"Question: {problem['question']} Problem: {problem['problem']} Answer:") + len(" 5") + 1


def test_files_of_the_source(tmp_path):
    """Bytes, padded on the right. Problems that do not fit are counted."""
    assert 160 < text_length(UPSTREAM) < 240
    long, short = {**UPSTREAM, "problem": 50 * UPSTREAM["problem"]}, {**UPSTREAM, "problem": ""}
    other = {**UPSTREAM, "solution": "Answer: 12.", "op": 2}
    files = {"train": write(tmp_path / "a.jsonl", UPSTREAM, other, long, short, other), "test": write(tmp_path / "b.jsonl", other)}
    with pytest.warns(
        UserWarning, match=r"a\.jsonl: 2 of 5 problems are not used; want 150 to 260 tokens and an answer within one window of 140"
    ):
        task = new_task({"name": "gsm-infinite", "shortest": 150, "longest": 260, "width": 140, **files})
    ids, mask, level = task.batch(0, 0, 40)
    found = Counter()
    for row, supervised, operations in zip(ids, mask, level, strict=True):
        real = bytes(row[row != 0].tolist()).decode()
        answer, op = (" 5", 4) if operations.max() == 4 else (" 12", 2)
        assert real == f"Question: {UPSTREAM['question']} Problem: {UPSTREAM['problem']} Answer:{answer}"
        assert not row[len(real) :].any()
        assert bytes(row[supervised].tolist()).decode() == f"{answer}\0"
        assert set(operations[supervised]) == {op}
        found[op] += 1
    assert found[2] > found[4] > 0
    assert set(task.batch(0, 0, 5, "test").level.max(axis=1)) == {2}
    assert task.exact_chance() == task.chance() == 1.0


def test_problems_of_files_in_a_batch_end_in_the_same_window(tmp_path):
    problems = [{**UPSTREAM, "problem": "x" * n} for n in range(0, 200, 5)]
    files = {"train": write(tmp_path / "a.jsonl", *problems), "test": write(tmp_path / "b.jsonl", *problems)}
    with pytest.warns(UserWarning, match="problems are not used"):
        task = new_task({"name": "gsm-infinite", "shortest": 90, "longest": 280, "width": 80, **files})
    ends = set()
    for step in range(20):
        mask = task.batch(0, step, 8).loss_mask
        first, last = mask.argmax(axis=1), mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        assert len({*(first // 80), *(last // 80)}) == 1
        assert (first % 80 > 0).all()
        ends.add(first[0] // 80)
    assert ends == {1, 2, 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"longest": 2000}, "shortest: 2001 is more than longest: 2000"),
        ({"shortest": 1200, "longest": 1900}, "longest: 1900: want at least 60 tokens more than width: 2000"),
        ({"operations": 1}, "operations: 1"),
        ({"train": "a.jsonl"}, "train, test: want both files"),
        ({"train": "a.jsonl", "test": "./a.jsonl"}, "test: ./a.jsonl is also the file to train on"),
        ({"train": "a.jsonl", "test": "b.jsonl"}, "a.jsonl: cannot be read"),
        ({"tokenizer": "none.json"}, "tokenizer: none.json: cannot be read"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(zoo.ZooError, match=message):
        new_task({"name": "gsm-infinite", **fields})


def test_too_short_for_a_problem():
    task = new_task({"name": "gsm-infinite", "operations": 2, "quantities": 2, "shortest": 20, "longest": 24, "width": 14})
    with pytest.raises(zoo.ZooError, match=r"longest: 24 tokens cannot hold the facts of a problem"):
        task.batch(0, 0, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a problem"),
        (json.dumps({**UPSTREAM, "solution": "no"}), "no 'Answer"),
        (json.dumps([1]), "line 2: not a problem"),
        (json.dumps({"problem": "x"}), "line 2: not a problem.*question"),
        (json.dumps({**UPSTREAM, "problem": 1}), "line 2: not a problem.*want texts"),
        (json.dumps({**UPSTREAM, "question": {}}), "line 2: not a problem.*want texts"),
        (json.dumps({**UPSTREAM, "op": None}), "line 2: not a problem"),
        (json.dumps({**UPSTREAM, "op": 0}), "line 2: not a problem.*op: 0"),
        (json.dumps({**UPSTREAM, "op": 10**30}), "line 2: not a problem.*op: 1000"),
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
    task = {**SMALL, "operations": 2, "quantities": 3, "shortest": 140, "longest": 200, "width": 60}
    plan = {
        "model": f"gdn4-sleep2-{evict}60",
        "overrides": {"layers": "attn gdn", "d_model": 16},
        "task": task,
        "steps": 2,
        "batch_size": 4,
    }
    results = train(validate(TrainConfig, {**plan, "eval_sequences": 4}, "test"), tmp_path / "run")
    assert results["level_name"] == "operations"
    assert results["answers"] == 4

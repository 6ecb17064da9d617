"""`gsm-infinite`: a question, then facts about named quantities, of which a few operations give the answer."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zoo.errors import ZooError
from zoo.tasks.task import Batch, Split, Task, tasks

LARGEST = 99
ANIMALS = re.findall(
    r"\w+",
    "ants bats bears bees beetles camels cats cows crabs crows deer dogs ducks eels elks foxes frogs geese goats hares "
    "herons lynxes mice moles moths newts otters owls seals swans toads wolves",
)
PLACES = re.findall(
    r"\w+",
    "Alder Barrow Birch Brook Cairn Cliff Copse Cove Dale Dell Delta Dune Fell Fen Fjord Ford Glade Glen Grove Heath "
    "Holm Isle Knoll Lagoon Marsh Mesa Moor Quarry Ridge Shoal Tarn Vale",
)
NAMES = len(ANIMALS) * len(PLACES)
OPERATIONS: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    ("sum", lambda a, b: a + b),
    ("difference", lambda a, b: a - b),
    ("product", lambda a, b: a * b),
)
SHARE_OF_NUMBERS = 0.4  # of the irrelevant facts; the others are operations


class Fact(NamedTuple):
    """A quantity that equals a number, or an operation on two other quantities."""

    name: int
    value: int
    operation: int = -1
    left: int = -1
    right: int = -1

    def __str__(self) -> str:
        if self.operation < 0:
            return f"The {_quantity(self.name)} equals {self.value}."
        word = OPERATIONS[self.operation][0]
        return f"The {_quantity(self.name)} equals the {word} of the {_quantity(self.left)} and the {_quantity(self.right)}."


class Problem(NamedTuple):
    question: str
    facts: str
    answer: str
    operations: int


class Encoded(NamedTuple):
    """A problem as tokens."""

    ids: list[int]
    answer: list[int]
    """The last tokens of `ids`, which are supervised."""
    operations: int


@tasks.register("gsm-infinite")
class GsmInfinite(Task):
    """Problems in the style of GSM-Infinite (arXiv 2502.05252), as in arXiv 2605.26099, section 6: the question comes first, no
    intermediate steps are shown, and irrelevant facts extend a sequence to `shortest` .. `longest` tokens.

    The relevant facts form a graph of 1 .. `operations` sums, differences and products of numbers from 1 to 9, with values of
    at most 99. Irrelevant facts extend this graph, so that only the question tells them apart. Facts are shuffled.
    Sequences are padded on the left to `longest` tokens. The answer and the token that ends it are supervised.

    Tokens: words and numbers, one token each; or the tokens of `tokenizer`; or, for problems read from files, bytes.
    """

    name = "gsm-infinite"
    level_name = "operations"
    paths = ("tokenizer", "train", "test")
    operations: int = Field(8, ge=1, le=64, description="largest number of operations in a problem")
    shortest: int = Field(
        2000, ge=1, description="smallest number of tokens in a sequence, padding excluded; may be missed by the length of a fact"
    )
    longest: int = Field(3300, ge=1, le=16000, description="number of tokens in a sequence, padding included")
    width: int = Field(2000, ge=2, description="window in tokens")
    tokenizer: str | None = Field(None, description="path of a tokenizer.json, or 'hub:OWNER/NAME' to download that of a repository")
    end: str = Field("<|endoftext|>", description="token of `tokenizer` that ends an answer and pads")
    train: str | None = Field(None, description="file of GSM-Infinite problems to use instead of generated ones; one JSON object per line")
    test: str | None = Field(None, description="held-out file of problems")

    @model_validator(mode="after")
    def _fits(self) -> GsmInfinite:
        last = (self.longest - 1) % self.width + 1
        if last < 16:
            raise ValueError(f"longest: {self.longest} leaves {last} tokens for the last window of {self.width}; want 16 for the answer")
        if not last < self.shortest <= self.longest:
            raise ValueError(f"shortest: {self.shortest}: want more than the {last} tokens of the last window, at most longest")
        if (self.train is None) != (self.test is None):
            raise ValueError("train, test: want both files, or neither")
        if self.train is not None and self.test is not None and Path(self.train).resolve() == Path(self.test).resolve():
            raise ValueError(f"test: {self.test} is also the file to train on")
        if self.train is None and self.operations * 40 > self.shortest:
            raise ValueError(f"operations: the facts of {self.operations} may not fit into {self.shortest} tokens, shortest")
        _ = self.text, self._files  # report unreadable files now
        return self

    @cached_property
    def text(self) -> Text:
        """The tokenizer."""
        if self.tokenizer is not None:
            return FromFile(self.tokenizer, self.end)
        return Words() if self.train is None else Utf8()

    @property
    def vocab_size(self) -> int:
        return self.text.size

    @property
    def window(self) -> int:
        return self.width

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return the relevant facts in order of computation: [count, 2 operations + 1, 5], padded with -1."""
        found = np.full((count, 2 * self.operations + 1, len(Fact._fields)), -1)
        dice = random.Random(int(rng.integers(2**63)))
        for row in found:
            graph = _graph(dice, dice.randint(1, self.operations))
            row[: len(graph)] = graph
        return found

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        dice = random.Random(int(rng.integers(2**63)))
        return self._laid_out([self._filled(dice, [Fact(*fact) for fact in row if fact[0] >= 0]) for row in contexts.tolist()])

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        if self._files is None:
            return super().batch(seed, step, size, split)
        chosen = np.random.default_rng([seed, step, split == "test"]).integers(0, len(self._files[split]), size)
        return self._laid_out([self._files[split][i] for i in chosen])

    def chance(self) -> float:
        """Accuracy of the most frequent next token of an answer, given the tokens before it."""
        after = Counter((tuple(answer[:i]), token) for answer in self._answers for i, token in enumerate(answer))
        best: dict[tuple[int, ...], int] = {}
        for (before, _), times in after.items():
            best[before] = max(best.get(before, 0), times)
        return sum(best.values()) / after.total()

    def exact_chance(self) -> float:
        """Return the share of the most frequent answer."""
        return max(Counter(map(tuple, self._answers)).values()) / len(self._answers)

    @cached_property
    def _answers(self) -> list[list[int]]:
        """Answers to the held-out problems of the file, or to 20,000 generated ones."""
        if self._files is not None:
            return [encoded.answer for encoded in self._files["test"]]
        dice = random.Random(0)
        return [self._answer(_graph(dice, dice.randint(1, self.operations))[-1].value) for _ in range(20_000)]

    @cached_property
    def _files(self) -> dict[Split, list[Encoded]] | None:
        """Problems of the files with at most `longest` tokens."""
        if self.train is None or self.test is None:
            return None
        paths: dict[Split, str] = {"train": self.train, "test": self.test}
        fit = {
            split: [encoded for p in read_problems(path) if len((encoded := self._encoded(p)).ids) <= self.longest]
            for split, path in paths.items()
        }
        for split, path in paths.items():
            if not fit[split]:
                raise ValueError(f"{split}: {path}: no problem of at most {self.longest} tokens, longest")
        return fit

    def _filled(self, dice: random.Random, relevant: list[Fact]) -> Encoded:
        """Return a problem of random length: the relevant facts among irrelevant ones."""
        target = dice.randint(self.shortest, self.longest)
        facts, asked, names = list(relevant), relevant[-1], {fact.name for fact in relevant}
        bare = Problem(_question(asked), "", str(asked.value), sum(fact.operation >= 0 for fact in relevant))
        room = target - len(self._encoded(bare).ids) - sum(map(self._length, facts))
        while room > 0 and len(names) < NAMES:
            while (name := dice.randrange(NAMES)) in names:
                pass
            if dice.random() < SHARE_OF_NUMBERS:
                facts.append(Fact(name, dice.randint(1, 9)))
            else:
                facts.append(_operation(dice, name, *dice.sample(facts, 2)))
            names.add(name)
            room -= self._length(facts[-1])
        while True:  # the text may have more or fewer tokens than its facts one by one
            encoded = self._encoded(bare._replace(facts=" ".join(map(str, dice.sample(facts, len(facts))))))
            if len(encoded.ids) <= target:
                return encoded
            if len(facts) == len(relevant):
                raise ZooError(f"task {self}: shortest: {self.shortest} tokens cannot hold the facts of {bare.operations} operations")
            facts.pop()

    def _length(self, fact: Fact) -> int:
        return len(self.text.encode(f" {fact}"))

    def _answer(self, answer: int | str) -> list[int]:
        return [*self.text.encode(f" {answer}"), *self.text.after]

    def _encoded(self, problem: Problem) -> Encoded:
        answer = self._answer(problem.answer)
        return Encoded(self.text.encode(f"{problem.question} Problem: {problem.facts} Answer:") + answer, answer, problem.operations)

    def _laid_out(self, problems: Sequence[Encoded]) -> Batch:
        ids = np.full((len(problems), self.longest), self.text.pad)
        level = np.zeros_like(ids)
        for row, operations, encoded in zip(ids, level, problems, strict=True):
            row[-len(encoded.ids) :] = encoded.ids
            operations[-len(encoded.answer) :] = encoded.operations
        return Batch(ids, level > 0, level)


def _graph(dice: random.Random, operations: int) -> list[Fact]:
    """Return numbers and `operations` operations on them, all of which the last one depends on."""
    names = iter(dice.sample(range(NAMES), 2 * operations + 1))
    facts: list[Fact] = []
    open_: list[Fact] = []  # results that no operation uses yet

    def number() -> Fact:
        facts.append(Fact(next(names), dice.randint(1, 9)))
        return facts[-1]

    for left in range(operations, 0, -1):
        # the remaining operations must suffice to join the open results
        kinds = [*(["begin"] if len(open_) < left else []), *(["extend"] if open_ else []), *(["join"] if len(open_) > 1 else [])]
        kind = dice.choice(kinds if len(open_) <= left else ["join"])
        if kind == "begin":
            a, b = number(), number()
        else:
            a = open_.pop(dice.randrange(len(open_)))
            others = [fact for fact in facts if fact not in open_ and fact != a]
            b = open_.pop(dice.randrange(len(open_))) if kind == "join" else dice.choice(others) if dice.random() < 0.3 else number()
        facts.append(_operation(dice, next(names), a, b))
        open_.append(facts[-1])
    return facts


def _operation(dice: random.Random, name: int, a: Fact, b: Fact) -> Fact:
    """Return a random operation with a value from 1 to LARGEST; if there is none, a difference of 0."""
    a, b = (a, b) if dice.random() < 0.5 else (b, a)
    high, low = (a, b) if a.value >= b.value else (b, a)
    fits = [i for i, (_, run) in enumerate(OPERATIONS) if 1 <= run(high.value, low.value) <= LARGEST]
    which = dice.choice(fits or [1])
    left, right = (high, low) if OPERATIONS[which][0] == "difference" else (a, b)
    return Fact(name, OPERATIONS[which][1](left.value, right.value), which, left.name, right.name)


def _quantity(name: int) -> str:
    animal, place = divmod(name, len(PLACES))
    return f"number of {ANIMALS[animal]} in {PLACES[place]}"


def _question(fact: Fact) -> str:
    animal, place = divmod(fact.name, len(PLACES))
    return f"Question: How many {ANIMALS[animal]} are in {PLACES[place]}?"


def read_problems(path: str) -> list[Problem]:
    """Read a file written by the generator of GSM-Infinite. Raises ValueError.

    Each line is a JSON object with `problem`, `question`, `op`, and a `solution` that contains "Answer: <number>.".
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return [_problem(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _problem(line: str, where: str) -> Problem:
    try:
        fields = json.loads(line)
        question, facts, solution, operations = (fields[key] for key in ("question", "problem", "solution", "op"))
        answer = re.search(r"Answer: (-?\d+)\b", solution)
        assert answer is not None, "solution: no 'Answer: <number>.'"
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{where}: not a problem of GSM-Infinite: {error!r}") from None
    return Problem(f"Question: {question}", facts, answer[1], int(operations))


class Text(Protocol):
    """Interface of a tokenizer."""

    size: int
    pad: int
    after: tuple[int, ...]
    """Tokens that end an answer."""

    def encode(self, text: str) -> list[int]: ...


class Words:
    """Tokenizer of generated problems: a token per word or number, and 0 for padding. Answers are one token and need no end."""

    pad = 0
    after: tuple[int, ...] = ()

    def __init__(self) -> None:
        frame = f"{_question(Fact(0, 0))} Problem: {Fact(0, 0)} {Fact(0, 0, 0, 0, 0)} Answer:"
        words = [*map(str, range(LARGEST + 1)), *self._split(frame), *(word for word, _ in OPERATIONS), *ANIMALS, *PLACES]
        self._ids = {word: i for i, word in enumerate(dict.fromkeys(words), 1)}
        self.words = ["", *self._ids]
        self.size = len(self.words)

    @staticmethod
    def _split(text: str) -> list[str]:
        return text.replace(".", " .").replace("?", " ?").replace(":", " :").split()

    def encode(self, text: str) -> list[int]:
        return [self._ids[word] for word in self._split(text)]


class Utf8:
    """Tokenizer with one token per byte; 0 ends answers and pads."""

    size, pad = 256, 0
    after: tuple[int, ...] = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def _downloaded(repository: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, "tokenizer.json")


class FromFile:
    """Tokenizer of a tokenizer.json."""

    def __init__(self, path: str, end: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(f"tokenizer: {path}: needs pip install 'sleep-zoo[serve]'") from None
        try:
            self._tokenizer = Tokenizer.from_file(_downloaded(path.removeprefix("hub:")) if path.startswith("hub:") else path)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"tokenizer: {path}: cannot be read: {error}") from None
        found = self._tokenizer.token_to_id(end)
        if found is None:
            raise ValueError(f"end: '{end}' is not a token of {path}")
        self.size, self.pad = self._tokenizer.get_vocab_size(), found
        self.after: tuple[int, ...] = (found,)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

"""`gsm-infinite`: a question, then facts about quantities, of which a few give the answer."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zoo.errors import ZooError
from zoo.tasks import gsm_graph
from zoo.tasks.gsm_graph import Fact, Problem
from zoo.tasks.gsm_words import CORE_ANIMALS, CORE_PLACES, GROUPS, NAMES, FromFile, Text, Utf8, Words, question, sentence
from zoo.tasks.task import Batch, Split, Task, refuse_same_file, tasks

COLUMNS = 8  # columns of an encoded fact: name, number, times, minus, up to four operands
FACT = 60  # few facts have more tokens
KINDS_PER_PLACE = 16  # irrelevant facts about each place, one per kind
SHARE_OF_TOTALS = 0.1  # share of totals among the irrelevant facts that depend on one relevant quantity


class Encoded(NamedTuple):
    """A problem as tokens."""

    ids: list[int]
    answer: list[int]
    """The last tokens of `ids`, which are supervised."""
    operations: int


@tasks.register("gsm-infinite")
class GsmInfinite(Task):
    """Problems of GSM-Infinite (arXiv 2502.05252), medium setting, laid out as in arXiv 2605.26099, section 6: the question comes
    first, no intermediate steps are shown, and irrelevant facts extend a problem to `shortest` .. `longest` tokens.

    `zoo.tasks.gsm_graph` draws the relevant facts as upstream does: 2 .. `operations` edges of a dependency graph, copies included,
    numbers from 1 to 4, totals that are never stated. Half of the problems are reverse: a later value is given, and the one asked
    for follows from a linear equation. Every irrelevant fact is about a place and a kind that no relevant one mentions, and
    depends on relevant quantities. The wording is ours; upstream's instructions and worked examples are absent.

    Problems are padded on the right to `longest` tokens. All problems of a batch end in the same window, and none in the first.
    The answer and the token that ends it are supervised.

    Tokens: words and numbers, one token each; or the tokens of `tokenizer`; or, for problems read from files, bytes.
    """

    name = "gsm-infinite"
    level_name = "operations"
    paths = ("tokenizer", "train", "test")
    long_answers = True
    operations: int = Field(8, ge=2, le=20, description="largest number of operations in a problem")
    quantities: int = Field(20, ge=2, le=20, description="largest number of stated quantities before irrelevant facts are added")
    shortest: int = Field(2001, ge=1, description="smallest number of tokens in a problem; in any case more than one window")
    longest: int = Field(3300, ge=1, le=16000, description="number of tokens in a sequence, padding included")
    width: int = Field(2000, ge=2, description="window in tokens")
    tokenizer: str | None = Field(None, description="path of a tokenizer.json, or 'hub:OWNER/NAME' to download that of a repository")
    end: str = Field("<|endoftext|>", description="token of `tokenizer` that ends an answer and pads")
    train: str | None = Field(None, description="file of GSM-Infinite problems to use instead of generated ones; one JSON object per line")
    test: str | None = Field(None, description="held-out file of problems")

    @model_validator(mode="after")
    def _fits(self) -> GsmInfinite:
        if self.shortest > self.longest:
            raise ValueError(f"shortest: {self.shortest} is more than longest: {self.longest}")
        if (self.train is None) != (self.test is None):
            raise ValueError("train, test: want both files, or neither")
        if self.train is not None and self.test is not None:
            refuse_same_file(self.train, self.test)
        if self.train is None and not self._lengths:
            raise ValueError(f"longest: {self.longest}: want at least {FACT} tokens more than width: {self.width}")
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

    @cached_property
    def _lengths(self) -> dict[int, range]:
        """Lengths of generated problems that end in each window. The first token after a sleep cannot be predicted, so an answer
        does not begin a window; a range that is shorter than a fact cannot be met."""
        found: dict[int, range] = {}
        for windows in range(2, -(-self.longest // self.width) + 1):
            low = max(self.shortest, (windows - 1) * self.width + 8)
            high = min(self.longest, windows * self.width)
            if high - low >= FACT or (low <= high and high == self.longest and not found):
                found[windows] = range(low, high + 1)
        return found

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return problems without irrelevant facts, a row per fact and one for the question: [count, quantities + 2, COLUMNS]."""
        rows = np.full((count, self.quantities + 2, COLUMNS), -1)
        dice = random.Random(int(rng.integers(2**63)))
        room = min(lengths[-1] for lengths in self._lengths.values())
        for row in rows:
            for _ in range(1000):
                problem = gsm_graph.draw(dice, dice.randint(2, self.operations), self.quantities, NAMES, GROUPS)
                if len(self._encoded(problem, map(sentence, problem.facts)).ids) <= room:
                    break
            else:
                raise ZooError(f"task {self}: longest: {self.longest} tokens cannot hold the facts of a problem")
            for i, fact in enumerate(problem.facts):
                row[i, : 4 + len(fact.operands)] = fact.name, fact.number, fact.times, fact.minus, *fact.operands
            row[-1, :4] = problem.asked, problem.answer, problem.operations, problem.reverse
        return rows

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        dice = random.Random(int(rng.integers(2**63)))
        windows = dice.choices(list(self._lengths), [len(lengths) for lengths in self._lengths.values()])[0]
        return self._laid_out([self._filled(dice, _problem(rows), self._lengths[windows]) for rows in contexts.tolist()])

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        if self._files is None:
            return super().batch(seed, step, size, split)
        rng, groups = np.random.default_rng([seed, step, split == "test"]), self._files[split]
        group = groups[rng.choice(len(groups), p=np.array([len(group) for group in groups]) / sum(map(len, groups)))]
        return self._laid_out([group[i] for i in rng.integers(0, len(group), size)])

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
        """Answers to the held-out problems of the file, or to 2,000 generated ones."""
        if self._files is not None:
            return [encoded.answer for group in self._files["test"] for encoded in group]
        return [self._answer(answer) for answer in _answers(self.operations, self.quantities)]

    @cached_property
    def _files(self) -> dict[Split, list[list[Encoded]]] | None:
        """Problems of the files that fit, in groups that end in the same window. Warns of the others."""
        if self.train is None or self.test is None:
            return None
        return {"train": self._grouped("train", self.train), "test": self._grouped("test", self.test)}

    def _grouped(self, split: Split, path: str) -> list[list[Encoded]]:
        groups: dict[int, list[Encoded]] = {}
        problems = read_problems(path)
        for problem in problems:
            encoded = self._encoded(problem, [problem.text])
            first, last = len(encoded.ids) - len(encoded.answer), len(encoded.ids) - 1
            window = last // self.width
            if self.shortest <= len(encoded.ids) <= self.longest and window and first > window * self.width:
                groups.setdefault(window, []).append(encoded)
        if not groups:
            raise ValueError(f"{split}: {path}: no problem of {self.shortest} to {self.longest} tokens (shortest, longest)")
        if left := len(problems) - sum(map(len, groups.values())):
            why = f"want {self.shortest} to {self.longest} tokens and an answer within one window of {self.width}, not the first"
            warnings.warn(f"{path}: {left} of {len(problems)} problems {'is' if left == 1 else 'are'} not used; {why}", stacklevel=2)
        return list(groups.values())

    def _filled(self, dice: random.Random, problem: Problem, lengths: range) -> Encoded:
        """Return a problem of random length: the relevant facts among irrelevant ones."""
        relevant = [sentence(fact) for fact in problem.facts]
        bare = len(self._encoded(problem, relevant).ids)
        for _ in range(100):
            texts, missing, more = list(relevant), dice.choice(lengths) - bare, _irrelevant(dice, problem)
            while missing > 0:
                texts.append(sentence(next(more)))
                missing -= len(self.text.encode(f" {texts[-1]}"))
            while len(texts) >= len(relevant):  # the text may have more or fewer tokens than its facts one by one
                encoded = self._encoded(problem, dice.sample(texts, len(texts)))
                if len(encoded.ids) <= lengths[-1]:
                    break
                texts.pop()
            if len(encoded.ids) in lengths:
                return encoded
        raise ZooError(f"task {self}: no problem of {lengths[0]} to {lengths[-1]} tokens was found; allow more lengths")

    def _answer(self, answer: int | str) -> list[int]:
        return [*self.text.encode(f" {answer}"), *self.text.after]

    def _encoded(self, problem: Problem | Read, facts: Iterable[str]) -> Encoded:
        asked = problem.question if isinstance(problem, Read) else question(problem.asked)
        answer = self._answer(problem.answer)
        return Encoded(self.text.encode(f"{asked} Problem: {' '.join(facts)} Answer:") + answer, answer, problem.operations)

    def _laid_out(self, problems: Sequence[Encoded]) -> Batch:
        ids = np.full((len(problems), self.longest), self.text.pad)
        level = np.zeros_like(ids)
        for row, operations, encoded in zip(ids, level, problems, strict=True):
            end = len(encoded.ids)
            row[:end] = encoded.ids
            operations[end - len(encoded.answer) : end] = encoded.operations
        return Batch(ids, level > 0, level)


def _problem(rows: list[list[int]]) -> Problem:
    """Return the problem that `contexts` encoded."""
    *facts, (asked, answer, operations, reverse, *_) = rows
    known = [
        Fact(name, tuple(i for i in operands if i >= 0), number, bool(times), bool(minus))
        for name, number, times, minus, *operands in facts
        if name >= 0
    ]
    return Problem(known, asked, answer, operations, bool(reverse))


def _irrelevant(dice: random.Random, problem: Problem) -> Iterator[Fact]:
    """Yield facts about other places and kinds that depend on one or two quantities of the problem, or on one and the total of
    another such place: in the proportions of upstream."""
    known = sorted({problem.asked, *(name for fact in problem.facts for name in (fact.name, *fact.operands))})
    places = dice.sample(range(len(CORE_PLACES), NAMES.places), NAMES.places - len(CORE_PLACES))
    for number, place in enumerate(places):
        for kind in dice.sample(range(len(CORE_ANIMALS), NAMES.kinds), KINDS_PER_PLACE):
            operands = dice.sample(known, min(len(known), dice.randint(1, 2)))
            if len(operands) == 1 and number and dice.random() < SHARE_OF_TOTALS:
                operands.append(NAMES.total(places[number - 1]))
            yield Fact(NAMES.instance(place, kind), tuple(operands), minus=len(operands) == 2 and dice.random() < 0.5)


@lru_cache
def _answers(operations: int, quantities: int) -> list[int]:
    """Return the answers to 2,000 problems."""
    dice = random.Random(0)
    return [gsm_graph.draw(dice, dice.randint(2, operations), quantities, NAMES, GROUPS).answer for _ in range(2000)]


class Read(NamedTuple):
    """Problem read from a file."""

    question: str
    text: str
    answer: str
    operations: int


def read_problems(path: str) -> list[Read]:
    """Read a file written by the generator of GSM-Infinite. Raises ValueError.

    Each line is a JSON object with `problem`, `question`, `op`, and a `solution` that contains "Answer: <number>.".
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return [_read(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _read(line: str, where: str) -> Read:
    try:
        fields = json.loads(line)
        question, facts, solution, operations = (fields[key] for key in ("question", "problem", "solution", "op"))
        if not all(isinstance(text, str) for text in (question, facts)):
            raise ValueError("question, problem: want texts")
        if (answer := re.search(r"Answer: (-?\d+)\b", solution)) is None:
            raise ValueError("solution: no 'Answer: <number>.'")
        if not 0 < (operations := int(operations)) < 2**31:
            raise ValueError(f"op: {operations}: want a number of operations")
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: not a problem of GSM-Infinite: {error!r}") from None
    return Read(f"Question: {question}", facts, answer[1], operations)

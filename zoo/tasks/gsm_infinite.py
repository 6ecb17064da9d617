"""`gsm-infinite`: a question, then facts about named quantities, some of which answer it in a few operations; then the answer."""

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
SHARE_OF_NUMBERS = 0.4  # of the facts that do not matter; the rest are operations


class Fact(NamedTuple):
    """`name` is a number, or an operation on two other quantities."""

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


class Told(NamedTuple):
    """A problem in tokens."""

    ids: list[int]
    answer: list[int]
    """The last of `ids`."""
    operations: int


@tasks.register("gsm-infinite")
class GsmInfinite(Task):
    """Problems of the kind of GSM-Infinite (arXiv 2502.05252) as in arXiv 2605.26099, section 6: the question stands first, no
    working is shown, and facts that do not matter fill a sequence to `shortest` .. `longest` tokens.

    The facts that matter are a graph of 1 .. `operations` sums, differences and products over numbers from 1 to 9, every value at
    most 99; the others go on building on it, so that nothing but the question tells them apart. All stand in random order.
    Sequences are padded on the left to `longest` tokens; the answer, and the token that ends it, are to be predicted.

    Tokens: words and numbers, each a token; or those of `tokenizer`; or the bytes of problems read from files.
    """

    name = "gsm-infinite"
    level_name = "operations"
    operations: int = Field(8, ge=1, le=64, description="problems take 1 .. operations")
    shortest: int = Field(2000, ge=1, description="tokens of a sequence without padding, up to the size of a fact")
    longest: int = Field(3300, ge=1, le=16000, description="tokens of a sequence")
    width: int = Field(2000, ge=2, description="tokens of a window")
    tokenizer: str | None = Field(None, description="a tokenizer.json; 'hub:OWNER/NAME' downloads that of a repository")
    end: str = Field("<|endoftext|>", description="the token of `tokenizer` that ends an answer and pads")
    train: str | None = Field(None, description="file of problems of GSM-Infinite, a JSON object per line, instead of generated ones")
    test: str | None = Field(None, description="another one, held out")

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
        _ = self.text, self._files  # what cannot be read is told now
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
        """The facts that matter, in the order of their computation: [count, 2 operations + 1, 5]; -1 where there are fewer."""
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
        """The commonest token of an answer after those before it."""
        after = Counter((tuple(answer[:i]), token) for answer in self._answers for i, token in enumerate(answer))
        best: dict[tuple[int, ...], int] = {}
        for (before, _), times in after.items():
            best[before] = max(best.get(before, 0), times)
        return sum(best.values()) / after.total()

    def exact_chance(self) -> float:
        """The commonest answer."""
        return max(Counter(map(tuple, self._answers)).values()) / len(self._answers)

    @cached_property
    def _answers(self) -> list[list[int]]:
        """To the held-out problems of the file, or to 20,000 generated ones."""
        if self._files is not None:
            return [told.answer for told in self._files["test"]]
        dice = random.Random(0)
        return [self._answer(_graph(dice, dice.randint(1, self.operations))[-1].value) for _ in range(20_000)]

    @cached_property
    def _files(self) -> dict[Split, list[Told]] | None:
        """The problems of the files that are not too long."""
        if self.train is None or self.test is None:
            return None
        paths: dict[Split, str] = {"train": self.train, "test": self.test}
        fit = {
            split: [told for p in read_problems(path) if len((told := self._told(p)).ids) <= self.longest] for split, path in paths.items()
        }
        for split, path in paths.items():
            if not fit[split]:
                raise ValueError(f"{split}: {path}: no problem of at most {self.longest} tokens, longest")
        return fit

    def _filled(self, dice: random.Random, matter: list[Fact]) -> Told:
        """A problem of as many tokens as are drawn: facts that matter among others that do not."""
        target = dice.randint(self.shortest, self.longest)
        facts, asked, names = list(matter), matter[-1], {fact.name for fact in matter}
        bare = Problem(_question(asked), "", str(asked.value), sum(fact.operation >= 0 for fact in matter))
        room = target - len(self._told(bare).ids) - sum(map(self._length, facts))
        while room > 0 and len(names) < NAMES:
            while (name := dice.randrange(NAMES)) in names:
                pass
            if dice.random() < SHARE_OF_NUMBERS:
                facts.append(Fact(name, dice.randint(1, 9)))
            else:
                facts.append(_operation(dice, name, *dice.sample(facts, 2)))
            names.add(name)
            room -= self._length(facts[-1])
        while True:  # tokens of single facts may add up to more or less than those of the text
            told = self._told(bare._replace(facts=" ".join(map(str, dice.sample(facts, len(facts))))))
            if len(told.ids) <= target:
                return told
            if len(facts) == len(matter):
                raise ZooError(f"task {self}: shortest: {self.shortest} tokens cannot hold the facts of {bare.operations} operations")
            facts.pop()

    def _length(self, fact: Fact) -> int:
        return len(self.text.encode(f" {fact}"))

    def _answer(self, answer: int | str) -> list[int]:
        return [*self.text.encode(f" {answer}"), *self.text.after]

    def _told(self, problem: Problem) -> Told:
        answer = self._answer(problem.answer)
        return Told(self.text.encode(f"{problem.question} Problem: {problem.facts} Answer:") + answer, answer, problem.operations)

    def _laid_out(self, problems: Sequence[Told]) -> Batch:
        ids = np.full((len(problems), self.longest), self.text.pad)
        level = np.zeros_like(ids)
        for row, operations, told in zip(ids, level, problems, strict=True):
            row[-len(told.ids) :] = told.ids
            operations[-len(told.answer) :] = told.operations
        return Batch(ids, level > 0, level)


def _graph(dice: random.Random, operations: int) -> list[Fact]:
    """Numbers and so many operations on them, each needed for the last one."""
    names = iter(dice.sample(range(NAMES), 2 * operations + 1))
    facts: list[Fact] = []
    open_: list[Fact] = []  # results that nothing uses yet

    def number() -> Fact:
        facts.append(Fact(next(names), dice.randint(1, 9)))
        return facts[-1]

    for left in range(operations, 0, -1):
        # the operations left must be enough to bring the open results together
        kinds = [*(["begin"] if len(open_) < left else []), *(["go on"] if open_ else []), *(["join"] if len(open_) > 1 else [])]
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
    """One of those whose value is between 1 and the largest, if there is one; else a difference of zero."""
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
    """Problems in the files that GSM-Infinite's generator writes: objects with `problem`, `question`, `op`, and a `solution` that
    holds "Answer: <number>.". Raises ValueError."""
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
    """A tokenizer of whole texts."""

    size: int
    pad: int
    after: tuple[int, ...]
    """Tokens that end an answer."""

    def encode(self, text: str) -> list[int]: ...


class Words:
    """The words of generated problems, every number, and 0 for padding. Answers are one token, and need no end."""

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
    """Bytes; 0 ends and pads."""

    size, pad = 256, 0
    after: tuple[int, ...] = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def _downloaded(repository: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, "tokenizer.json")


class FromFile:
    """A tokenizer.json."""

    def __init__(self, path: str, end: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(f"tokenizer: {path}: needs pip install 'sleep-zoo[serve]'") from None
        try:
            self._tokenizer = Tokenizer.from_file(_downloaded(path.removeprefix("hub:")) if path.startswith("hub:") else path)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer: {path}: cannot be read: {error}") from None
        found = self._tokenizer.token_to_id(end)
        if found is None:
            raise ValueError(f"end: '{end}' is not a token of {path}")
        self.size, self.pad = self._tokenizer.get_vocab_size(), found
        self.after: tuple[int, ...] = (found,)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

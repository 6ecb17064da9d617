"""The English of `gsm-infinite`, and its tokenizers."""

from __future__ import annotations

import re
from typing import Protocol

from zoo.tasks.gsm_graph import GROUP, LARGEST_VALUE, Fact, Names

CORE_ANIMALS = re.findall(r"\w+", "owls foxes wolves hares otters cranes herons voles lynxes badgers")
CORE_PLACES = re.findall(r"\w+", "Alder Birch Cairn Dell Fen Glade Heath Knoll Marsh Tarn")
OTHER_ANIMALS = re.findall(
    r"\w+",
    "ants bats bees beetles camels cats cows crabs crows deer dogs ducks eels elks finches frogs geese goats gulls hens "
    "horses ibises lambs larks mice moles moths mules newts oxen pigs quails rams rats seals snails storks swans toads wasps",
)
OTHER_PLACES = re.findall(
    r"\w+",
    "Arbor Barrow Beacon Bluff Brook Canyon Cape Cliff Copse Cove Creek Dale Delta Dune Falls Fell Field Fjord Ford Gorge "
    "Grove Haven Hill Holm Isle Lagoon Lea Mead Mesa Mill Moor Orchard Pass Peak Plain Point Pool Quarry Ravine Reef "
    "Ridge Rock Shoal Spring Steppe Strand Summit Thicket Vale Weir",
)
ANIMALS, PLACES = CORE_ANIMALS + OTHER_ANIMALS, CORE_PLACES + OTHER_PLACES
NAMES = Names(len(PLACES), len(ANIMALS))
GROUPS = len(CORE_PLACES) // GROUP, len(CORE_ANIMALS) // GROUP


def sentence(fact: Fact) -> str:
    quantity = _quantity(fact.name)
    if not fact.operands and not fact.number:
        return f"The {quantity} exists, and is greater than 0."
    words = [f"The {quantity} equals"]
    if fact.number:
        words.append(str(fact.number))
        if fact.operands:
            words.append("times" if fact.times else "plus")
    operands = [f"the {_quantity(name)}" for name in fact.operands]
    if len(operands) == 1:
        words += operands
    elif fact.minus:
        words.append(f"the difference between {operands[0]} and {operands[1]}")
    elif operands:
        words.append(f"the sum of {', '.join(operands[:-1])} and {operands[-1]}")
    return " ".join(words) + "."


def question(name: int) -> str:
    return f"Question: What is the {_quantity(name)}?"


def _quantity(name: int) -> str:
    place, kind = NAMES.split(name)
    return f"{'total number of animals' if kind is None else f'number of {ANIMALS[kind]}'} in {PLACES[place]}"


class Text(Protocol):
    """Interface of a tokenizer."""

    size: int
    pad: int
    after: tuple[int, ...]
    """Tokens that end an answer."""

    def encode(self, text: str) -> list[int]: ...


class Words:
    """Tokenizer of generated problems: a token per word, number or mark, and 0 for padding. Answers are one token and need no end."""

    pad = 0
    after: tuple[int, ...] = ()

    def __init__(self) -> None:
        frame = f"{question(NAMES.total(0))} Problem: {sentence(Fact(0))} {sentence(Fact(0, (0, 0, 0), 1))} Answer:"
        marks = "times plus the difference between and"
        words = [*self._split(f"{frame} {marks}"), *map(str, range(LARGEST_VALUE + 1)), *ANIMALS, *PLACES]
        self._ids = {word: i for i, word in enumerate(dict.fromkeys(words), 1)}
        self.words = ["", *self._ids]
        self.size = len(self.words)

    @staticmethod
    def _split(text: str) -> list[str]:
        for mark in ".,:?":
            text = text.replace(mark, f" {mark}")
        return text.split()

    def encode(self, text: str) -> list[int]:
        return list(map(self._ids.__getitem__, self._split(text)))


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

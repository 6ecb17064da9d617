"""`depo`: several windows show the edges of a cycle of named nodes; the questions ask where k hops from a node lead."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zoo.tasks.task import Batch, Split, Task, tasks

LETTERS = 50  # a name is at most one of these tokens, followed by one of 50 others that end a name
PAD, LAST, HOP = 0, 1 + LETTERS, 2 * LETTERS


@tasks.register("depo")
class Depo(Task):
    """Depo of arXiv 2605.26099, section 5, with the names of Depo1 ("Physics of Language Models", part 4.1).

    A directed cycle of n <= `nodes` nodes: its edges `u v` in random order, padded on the left to 4 windows of `nodes` tokens.
    Then a prediction chunk of questions `k u ; v`, where v is k hops from u, padded on the right. Names are distinct and have
    one or two tokens. `;` and v are supervised, as in the source, so that losses are comparable. No start node is asked about twice.

    Tokens: 0 pads; 1-50 begin names of two tokens; 51-100 end names; 100 + k is "k hops"; 101 + hops is `;`.
    In training, n is drawn from 3 .. nodes with P(n) ~ 1 / (n + sqrt(nodes)), and k from 1 .. hops. Held-out cycles have all
    `nodes` nodes, and k is a power of two.
    """

    name = "depo"
    level_name = "hops"
    long_answers = True
    nodes: int = Field(75, ge=3, le=1000, description="number of nodes on the largest cycle; also the window in tokens")
    hops: int = Field(16, ge=1, description="largest number of hops in a question")
    questions: int = Field(10, ge=1, description="per sequence, at most n")
    largest: bool = Field(False, description="use all nodes in training too")
    powers: bool = Field(False, description="ask for 1, 2, 4, 8, ... hops alone in training too")

    @model_validator(mode="after")
    def _fits(self) -> Depo:
        if 6 * self.questions > self.nodes:
            raise ValueError(f"questions: {self.questions} of up to six tokens each do not fit into a window of {self.nodes}")
        return self

    @property
    def vocab_size(self) -> int:
        return HOP + self.hops + 2

    @property
    def window(self) -> int:
        return self.nodes

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        if split == "test" and not (self.largest and self.powers):
            return self.model_copy(update={"largest": True, "powers": True}).batch(seed, step, size, split)
        return super().batch(seed, step, size, split)

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return, along each cycle, the name of every node (a number) and the rank of its edge: [count, 2, nodes]; -1 past n."""
        sizes = np.arange(3, self.nodes + 1)
        odds = 1 / (sizes + self.nodes**0.5)
        n = np.full(count, self.nodes) if self.largest else rng.choice(sizes, count, p=odds / odds.sum())
        cycles = np.full((count, 2, self.nodes), -1)
        for row, size in zip(cycles, n, strict=True):
            row[0, :size] = _names(rng, size)
            row[1, :size] = rng.permutation(size)
        return cycles

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        shown, asked = 4 * self.nodes, 6 * self.questions
        ids = np.full((len(contexts), shown + asked), PAD)
        level = np.zeros_like(ids)
        allowed = [2**i for i in range(self.hops.bit_length())] if self.powers else range(1, self.hops + 1)
        for row, hops_of, (cycle, place) in zip(ids, level, contexts, strict=True):
            n = int((cycle >= 0).sum())
            edges = [token for i in np.argsort(place[:n]) for node in (i, (i + 1) % n) for token in spell(cycle[node])]
            row[shown - len(edges) : shown] = edges
            at = shown
            for start in rng.permutation(n)[: self.questions]:
                hops = allowed[int(rng.integers(len(allowed)))]
                question = [HOP + hops, *spell(cycle[start])]
                answer = [HOP + self.hops + 1, *spell(cycle[(start + hops) % n])]
                row[at : at + len(question) + len(answer)] = question + answer
                hops_of[at + len(question) : at + len(question) + len(answer)] = hops
                at += len(question) + len(answer)
        return Batch(ids, level > 0, level)

    def chance(self) -> float:
        """Accuracy of always predicting `;` and guessing the length and tokens of a name.

        Off by less than 0.01 if there are few nodes: since names are distinct, short ones are slightly more frequent.
        """
        return (1 + 0.5 / LETTERS + 0.5 / LETTERS) / 2.5


def spell(name: int) -> list[int]:
    """Return the tokens of a name."""
    before, last = divmod(int(name), LETTERS)
    return [LAST + last] if before == 0 else [before, LAST + last]


def _names(rng: np.random.Generator, count: int) -> list[int]:
    """Distinct names, of one or two tokens with equal probability."""
    found: dict[int, None] = {}
    while len(found) < count:
        before = rng.integers(1, LETTERS + 1, count) * rng.integers(0, 2, count)
        found.update(dict.fromkeys((LETTERS * before + rng.integers(0, LETTERS, count)).tolist()))
    return list(found)[:count]

"""`cycle`: the window shows a permutation that is one cycle; the questions ask where k hops from a node lead."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zoo.tasks.task import Batch, Task, tasks


@tasks.register("cycle")
class Cycle(Task):
    """A window shows f(0) ... f(m - 1), so the index of a token is the node whose successor it is. Prediction chunks follow,
    as many as the questions need: each question `k x` is answered by f^k(x).

    Tokens: node x is x, "k hops" is m - 1 + k; in joint questions, "k hops from x" is k m + x. All questions of a sequence
    differ. Attention no longer sees f when the questions are asked, so the model must follow the hops while it sleeps.

    Answers are part of the stream, and each fixes how far apart two nodes are. With many questions, a reader who never saw f
    can work out later answers from earlier ones; only the first answer cannot be known without f.
    """

    name = "cycle"
    level_name = "hops"
    nodes: int = Field(12, ge=3, description="m, number of nodes on the cycle")
    hops: int = Field(4, ge=1, description="largest number of hops in a question")
    joint: bool = Field(False, description="encode a question (k, x) as one token instead of two")
    questions: int | None = Field(None, ge=1, description="per sequence; default: as many as fit into one window")

    @model_validator(mode="after")
    def _fits(self) -> Cycle:
        if self.hops >= self.nodes:
            raise ValueError(f"hops: {self.hops} must be less than nodes: {self.nodes}")
        if self.questions is not None and self.questions > self.nodes // self.length and self.nodes % self.length:
            raise ValueError(f"questions: {self.questions} of {self.length} tokens each do not fit into a window of {self.window}")
        if self.questions is not None and self.questions > self.nodes * self.hops:
            raise ValueError(f"questions: {self.questions} is more than the {self.nodes * self.hops} that there are")
        return self

    @property
    def length(self) -> int:
        """Number of tokens in a question and its answer."""
        return 2 if self.joint else 3

    @property
    def vocab_size(self) -> int:
        return self.nodes * (1 + self.hops) if self.joint else self.nodes + self.hops

    @property
    def window(self) -> int:
        return self.nodes

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return random cycles f: [count, nodes]."""
        order = rng.permuted(np.tile(np.arange(self.nodes), (count, 1)), axis=1)
        successor = np.empty_like(order)
        np.put_along_axis(successor, order, np.roll(order, -1, axis=1), axis=1)
        return successor

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        count, m = contexts.shape
        asked = self.questions or m // self.length
        chosen = rng.permuted(np.tile(np.arange(m * self.hops), (count, 1)), axis=1)[:, :asked]
        hops, node = chosen // m + 1, chosen % m
        answer = node
        for hop in range(self.hops):
            answer = np.where(hop < hops, np.take_along_axis(contexts, answer, axis=1), answer)
        question = [hops * m + node] if self.joint else [m - 1 + hops, node]
        asking = np.stack([*question, answer], axis=2).reshape(count, -1)
        supervised = np.tile(np.arange(self.length) == self.length - 1, (count, asked))
        silent = np.zeros((count, m), dtype=bool)
        level = np.where(supervised, np.repeat(hops, self.length, axis=1), 0)
        return Batch(
            np.concatenate([contexts, asking], axis=1),
            np.concatenate([silent, supervised], axis=1),
            np.concatenate([silent.astype(np.int64), level], axis=1),
        )

    def chance(self) -> float:
        """Accuracy of a reader who never saw f but uses all distances that the earlier answers fix. Where these do not decide, the
        reader guesses uniformly among the nodes that fit. Simulated on 4,000 sequences."""
        return self._reader

    @cached_property
    def _reader(self) -> float:
        m, ids = self.nodes, self.batch(0, 0, 4000, "test").ids
        rows = np.arange(len(ids))
        # nodes with known distances form a group: the number of each node's group, and its place relative to the group's first node
        group, place = (np.tile(start, (len(ids), 1)) for start in (np.arange(m), np.zeros(m, dtype=np.int64)))
        right = []
        for at in range(m, ids.shape[1], self.length):
            hops, node = np.divmod(ids[:, at], m) if self.joint else (ids[:, at] - m + 1, ids[:, at + 1])
            answer, mine = ids[:, at + self.length - 1], group[rows, node]
            target = (place[rows, node] + hops) % m
            inside = group == mine[:, None]
            taken = np.zeros((len(ids), m), dtype=bool)
            np.put_along_axis(taken, np.where(inside, place, place[rows, node][:, None]), True, axis=1)
            fits = ~inside
            for candidate in range(m):  # would its group, with it at the target, meet ours?
                moved = (place - place[:, candidate, None] + target[:, None]) % m
                meets = np.take_along_axis(taken, moved, axis=1) & (group == group[:, candidate, None])
                fits[:, candidate] &= ~meets.any(axis=1)
            right.append(np.where(taken[rows, target], 1.0, 1 / np.maximum(1, fits.sum(axis=1))))
            joins = group == group[rows, answer][:, None]
            place = np.where(joins, (place - place[rows, answer][:, None] + target[:, None]) % m, place)
            group = np.where(joins, mine[:, None], group)
        return float(np.mean(right))

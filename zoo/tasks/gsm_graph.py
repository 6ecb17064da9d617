"""The dependency graphs of `gsm-infinite`: the quantities of a problem, and what each equals.

The algorithm of iGSM (arXiv 2407.20311, appendix) as the generator of GSM-Infinite implements it
(https://github.com/Infini-AI-Lab/gsm_infinite, forward_generator.py and reverse_generator.py, its medium setting: d = 2), line by
line and with its quirks, so that the distributions agree.

A structure connects places with kinds; a connected pair is an instance, the number of that kind in that place, and is stated by one
fact. The total of a place is the sum of its instances and is never stated. `op` counts the edges of the graph that the answer needs:
copies, terms of sums and totals, and random numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import NamedTuple

RNG = -1  # the node that a quantity depends on if it has its own random number
LARGEST_NUMBER = 4
LARGEST_VALUE = 1000
GROUP = 5  # names of a problem come from one group of this size for places, and one for kinds
LIMITS = (3, 4, 4, 6, 6, 10, 10, 10, 15, 15, 20, 20, 20, 20, 25, 25, 25, 30, 30)  # upstream's --opmax for op 2, 3, ... 20

Edge = tuple[int, int]


class Fact(NamedTuple):
    """A quantity equals a number, an operation on other quantities, or a number plus or times one of these."""

    name: int
    """See `Names`."""
    operands: tuple[int, ...] = ()
    """Quantities that the fact refers to: one is a copy, three or more are a sum."""
    number: int = 0
    """Number in the fact; 0: there is none."""
    times: bool = False
    """True if the number is a factor instead of a term."""
    minus: bool = False
    """True if two operands are subtracted instead of added."""


class Problem(NamedTuple):
    """Facts about quantities, and a question."""

    facts: list[Fact]
    asked: int
    answer: int
    operations: int
    reverse: bool
    """True if the fact about the quantity asked for only says that it exists. Its value then follows from the last fact, which gives the
    value of another quantity."""


class _FailedError(Exception):
    """An attempt failed: upstream's generator starts again."""


class Names(NamedTuple):
    """Numbers of places and kinds, which determine the index of each quantity."""

    places: int
    kinds: int

    def instance(self, place: int, kind: int) -> int:
        return place * (self.kinds + 1) + kind

    def total(self, place: int) -> int:
        return place * (self.kinds + 1) + self.kinds

    def split(self, name: int) -> tuple[int, int | None]:
        """Return place and kind; no kind: the total."""
        place, kind = divmod(name, self.kinds + 1)
        return place, None if kind == self.kinds else kind


def draw(dice: random.Random, operations: int, quantities: int, names: Names, groups: tuple[int, int]) -> Problem:
    """Return a random problem with this `op`, half of them reverse.

    Args:
        quantities: the largest number of instances; upstream's ip_max.
        groups: numbers of groups of places and of kinds; a group is GROUP successive numbers.
    """
    reverse = dice.random() < 0.5
    while True:
        try:
            return _attempt(dice, operations, quantities, reverse, names, groups)
        except _FailedError:
            continue


def _attempt(dice: random.Random, operations: int, quantities: int, reverse: bool, names: Names, groups: tuple[int, int]) -> Problem:
    size = (LIMITS[operations - 2] + 1) // 2
    n = max(dice.randint(1, size), dice.randint(1, size))
    m = dice.randint(n, size)
    graph = _Graph(dice, _structure(dice, size, quantities, reverse))
    graph.choose(n, m)
    graph.order(totals_last=reverse)
    if len(graph.topo) == 2 and dice.random() < 0.5:
        graph.lengthen()
    graph.add_operations(size)
    if sum(len(graph.inputs[node]) for node in graph.topo) != operations:
        raise _FailedError
    needed = list(graph.topo)
    graph.add_unneeded()
    place, kind = (GROUP * dice.randrange(count) for count in groups)
    places, kinds = ([first + i for i in dice.sample(range(GROUP), GROUP)] for first in (place, kind))
    name = {node: names.total(places[-2 - node]) for node in graph.inputs if node < RNG}
    name |= {node: names.instance(places[p], kinds[k]) for node, (p, k) in enumerate(graph.edges)}
    facts = {node: _fact(dice, name, node, graph.inputs[node]) for node in graph.instances}
    asked, final = needed[-1], needed[-1]
    if reverse:
        free = [node for node in needed if node >= 0 and set(graph.inputs[node]) <= {RNG}]
        if not free:
            raise _FailedError
        asked = free[-1]
    value = _evaluated(needed, graph.inputs, facts, asked)
    if reverse and value[final][1] == 0:
        raise _FailedError
    stated = [Fact(name[node]) if reverse and node == asked else fact for node, fact in facts.items()]
    if reverse:
        stated.append(Fact(name[final], number=value[final][0]))
    return Problem(stated, name[asked], value[asked][0], operations, reverse)


def _fact(dice: random.Random, name: dict[int, int], node: int, inputs: list[int]) -> Fact:
    operands = tuple(name[i] for i in inputs if i != RNG)
    plus = dice.random() < 0.5
    number = 0
    if RNG in inputs or not operands:
        number = dice.randint(2 if RNG in inputs and not plus else 1, LARGEST_NUMBER)
    return Fact(name[node], operands, number, bool(number and operands and not plus), len(operands) == 2 and dice.random() < 0.5)


def _evaluated(needed: list[int], inputs: dict[int, list[int]], facts: dict[int, Fact], unknown: int) -> dict[int, tuple[int, int]]:
    """Return the value of each node, and its derivative with respect to the unknown one. Raises for values that upstream refuses."""
    value: dict[int, tuple[int, int]] = {}
    for node in needed:
        terms = [value[i] for i in inputs[node] if i != RNG]
        total, slope = sum(v for v, _ in terms), sum(s for _, s in terms)
        fact = facts.get(node, Fact(0))
        if fact.minus:
            total, slope = terms[0][0] - terms[1][0], terms[0][1] - terms[1][1]
        if fact.times:
            total, slope = fact.number * total, fact.number * slope
        else:
            total += fact.number
        value[node] = total, slope + (node == unknown)
        if not (0 if node < 0 else 1) <= total <= LARGEST_VALUE:
            raise _FailedError
    return value


def _structure(dice: random.Random, size: int, quantities: int, reverse: bool) -> list[Edge]:
    """Return pairs (place, kind), place by place."""
    relative = (size - 1) / max(1, quantities - 1)
    weights = [math.exp(-((relative - middle) ** 2)) for middle in (0.1, 0.3, 0.5, 0.7, 0.9)]
    sizes = dice.choices((1, 2, 3, 4, 5), weights, k=2)
    if size <= 5:
        sizes = [min(s, 3) if reverse else max(s, 2) for s in sizes]
    low, high = sorted(sizes)
    if low > quantities:
        raise _FailedError
    count = min(dice.randint(low, quantities), dice.randint(low, quantities), high**2)
    layers, p = [low, low], dice.random()
    while layers != [high, high]:
        if layers[0] * layers[1] >= count and (layers[1] == count or dice.random() >= p):
            break
        layers[dice.choice([i for i in (0, 1) if layers[i] < high])] += 1
    edges = {(dice.randrange(layers[0]), kind) for kind in range(layers[1])}
    for _ in range(10 * count):
        if len(edges) >= count:
            break
        alone = set(range(layers[0])) - {place for place, _ in edges}
        edges.add((dice.choice(sorted(alone) or range(layers[0])), dice.randrange(layers[1])))
    if len(edges) < count or len({place for place, _ in edges}) < layers[0]:
        raise _FailedError
    return sorted(edges, key=lambda edge: (edge[0], dice.random()))


class _Graph:
    """A dependency graph under construction. Instance i is the i-th pair of the structure, and the total of place p is -2 - p."""

    def __init__(self, dice: random.Random, edges: list[Edge]) -> None:
        self.dice, self.edges = dice, edges
        self.inputs: dict[int, list[int]] = {i: [] for i in range(len(edges))}
        self.users: dict[int, set[int]] = {i: set() for i in range(len(edges))}
        for i, (place, _) in enumerate(edges):
            self.users.setdefault(-2 - place, set())
            self.connect(i, -2 - place)
        self.instances: list[int] = []
        self.totals: list[int] = []
        self.topo: list[int] = []
        self.left = [node for node in self.inputs if node < RNG]  # totals that are not chosen

    def connect(self, source: int, target: int) -> None:
        if source not in self.inputs.setdefault(target, []):
            self.inputs[target].append(source)
        if source != RNG:
            self.users[source].add(target)

    def add(self, nodes: Iterable[int]) -> None:
        """Add quantities, and the instances of totals."""
        for node in nodes:
            known = self.totals if node < 0 else self.instances
            if node not in known:
                known.append(node)
                if node < 0:
                    self.add(i for i in self.inputs[node] if i >= 0)

    def choose(self, n: int, m: int) -> None:
        """Take totals with at most n instances together, then single instances (drawNecessary1)."""
        done = 0
        while self.left:
            total = self.left.pop(self.dice.randrange(len(self.left)))
            if done + len(self.inputs[total]) > n:
                break
            done += len(self.inputs[total])
            self.add([total])
        for _ in range(1, m - done):
            if rest := [i for i in range(len(self.edges)) if i not in self.instances]:
                self.add([self.dice.choice(rest)])
        if not self.instances:
            raise _FailedError

    def order(self, totals_last: bool) -> None:
        """Put the quantities in an order of computation, from the last to the first, and connect them (drawNecessary2)."""
        while True:
            rest = self._rest()
            ready, used = self._ready(rest), self._used(rest)
            if self.topo:
                node = self.dice.choice([x for x in ready if x in used])
            else:
                node = next((x for x in ready if x < 0 and totals_last), None) or self.dice.choice(ready)
            self.topo.insert(0, node)
            rest = self._rest()
            if not rest:
                return
            ready, used = self._ready(rest), self._used(rest)
            if not set(ready) & set(used):
                if node < 0:
                    raise _FailedError
                self.connect(self._biased(ready, used), node)
            elif node >= 0 and self.dice.random() < self.dice.random():
                self.connect(self._biased(rest, used), node)

    def _rest(self) -> list[int]:
        return [x for x in (*self.totals, *self.instances) if x not in self.topo]

    def _ready(self, rest: list[int]) -> list[int]:
        """Return the nodes that nothing in `rest` depends on."""
        return [x for x in rest if not self.users[x] & set(rest)]

    def _used(self, rest: list[int]) -> list[int]:
        """Return the nodes that something in the order depends on."""
        return [x for x in rest if self.users[x] & set(self.topo)]

    def _biased(self, nodes: list[int], used: list[int]) -> int:
        """Choose a node; totals, and nodes that are already used, are more likely."""
        weights = [math.exp(((x < 0) + (x in used)) * abs(self.dice.gauss(0, 1))) for x in nodes]
        return self.dice.choices(nodes, weights)[0]

    def lengthen(self) -> None:
        """Add a third quantity, before or after the two (addingparameter)."""
        new = next((i for i in range(len(self.edges)) if i not in self.topo), None)
        if new is None:
            return
        if self.dice.random() < 0.5:
            self.connect(new, self.topo[0])
            self.topo.insert(0, new)
        else:
            self.connect(self.topo[1], new)
            self.topo.append(new)
        self.add([new])

    def add_operations(self, size: int) -> None:
        """Give instances more inputs until there are `size` operations (drawNecessary3)."""
        place = {node: i for i, node in enumerate(self.topo)}
        wanted = {node: len(self.inputs[node]) for node in self.topo}
        most = {i: min(3, max(1, place[i])) for i in self.instances}
        while sum(wanted.values()) < size:
            free = [i for i in self.instances if wanted[i] < most[i]]
            if not free:
                raise _FailedError
            wanted[self.dice.choice(free)] += 1
        for i in self.instances:
            pool = [RNG, *self.topo[: place[i]]]
            count = min(len(pool), self.dice.randint(1, 2) if wanted[i] == 1 else wanted[i] + 1)
            if set(pool) & set(self.inputs[i]):
                pool.pop()  # upstream means the input that is there already
                count -= 1
            if count < len(pool):
                chosen = []
                if self.dice.random() < 0.5:
                    chosen.append(RNG)
                    count -= 1
                chosen += self.dice.sample(pool[1:], max(0, count))
            else:
                chosen = pool
            for source in chosen:
                self.connect(source, i)

    def add_unneeded(self) -> None:
        """Add all other instances of the structure, with inputs of their own (drawUnnecessary)."""
        independent: list[int] = []
        pending = [i for i in range(len(self.edges)) if i not in self.instances]
        while pending:
            new = self.dice.choice(pending)
            own = -2 - self.edges[new][0]  # upstream lets a quantity depend on a total of which it is a part
            computable = [total for total in self.left if set(self.inputs[total]) & set(self.instances) and total != own]
            pool = [*self.totals, *self.instances, *(total for total in computable if total not in self.totals)]
            if self.dice.random() < 0.5:
                pool = list(independent)
                independent.append(new)
            self.add([new])
            count = 1
            while count < min(4, len(pool) + 1) and self.dice.random() < 0.5:
                count += 1
            if count == len(pool) + 1:
                chosen = [*pool, RNG]
            else:
                random_number = self.dice.random() < 0.5
                chosen = [RNG] * random_number + self.dice.sample(pool, count - random_number)
            for source in chosen:
                if source != RNG:
                    self.add([source])
                self.connect(source, new)
            pending = [i for i in pending if i not in self.instances]

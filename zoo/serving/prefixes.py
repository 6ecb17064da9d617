"""States of streams by the tokens that they have read: a prompt that begins like an earlier one continues from there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor
from torch.utils._pytree import tree_map_only

from zoo.sessions.snapshot import Snapshot, size

Sleeps = tuple[tuple[int, int], ...]
"""Position and loops of the sleeps that do not follow from the tokens, as in `Snapshot.sleeps`."""
Key = tuple["_Node", Sleeps]


@dataclass(eq=False)
class _Node:
    """Tokens after those of the parent, and the states of streams that have read up to their end."""

    edge: tuple[int, ...] = ()
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    """Nodes below this one, by their first token."""
    kept: dict[Sleeps, _Kept] = field(default_factory=dict)


@dataclass(eq=False)
class _Kept:
    snapshot: Snapshot
    bytes: int
    users: set[str | None]
    """Sessions that made or used it; None stands for requests without one."""


class Prefixes:
    """One prefix tree of states for each owner; owners share nothing. The least recently used states are dropped first.

    Args:
        limit: maximum size of all states together, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._roots: dict[str, _Node] = {}
        self._order: OrderedDict[Key, None] = OrderedDict()
        """States in order of use, the least recently used first."""
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of states."""
        return len(self._order)

    def longest(self, owner: str, tokens: Sequence[int], sleeps: Sleeps = (), user: str | None = None) -> tuple[int, Snapshot | None]:
        """Return the length of the longest prefix of `tokens` whose state is kept, and that state; 0 and None if there is none.

        Args:
            sleeps: sleeps of the stream on its way through `tokens`. The state has had the first of them; the others are still to come.
            user: the session that will use it.
        """
        tokens, at = tuple(tokens), 0
        best: tuple[int, _Node, Sleeps] | None = None
        with self._lock:
            node = self._roots.get(owner)
            while node is not None and tokens[at : at + len(node.edge)] == node.edge:
                at += len(node.edge)
                for had in (sleeps[:n] for n in range(len(sleeps), -1, -1)):
                    if had in node.kept and all(position >= at for position, _ in sleeps[len(had) :]):
                        best = at, node, had
                        break
                node = node.children.get(tokens[at]) if at < len(tokens) else None
            if best is None:
                return 0, None
            at, node, had = best
            self._order.move_to_end((node, had))
            node.kept[had].users.add(user)
            return at, node.kept[had].snapshot

    def keep(self, owner: str, tokens: Sequence[int], snapshot: Snapshot, user: str | None = None) -> None:
        """Keep the state of a stream that has read, or generated, exactly `tokens`."""
        snapshot = _alone(snapshot)
        cost = size((snapshot.waking, snapshot.logits, snapshot.ids))
        cost += 0 if snapshot.start is snapshot.waking else size(snapshot.start)
        with self._lock:
            node = self._descend(self._roots.setdefault(owner, _Node()), tuple(tokens))
            users = {user}
            if snapshot.sleeps in node.kept:
                users |= self._drop(node, snapshot.sleeps, prune=False).users
            node.kept[snapshot.sleeps] = _Kept(snapshot, cost, users)
            self._order[node, snapshot.sleeps] = None
            self.bytes += cost
            while self.bytes > self.limit:
                self._drop(*next(iter(self._order)))

    def forget(self, owner: str, user: str) -> None:
        """Drop the states that only this session has used."""
        with self._lock:
            for node, sleeps in list(self._order):
                kept = node.kept[sleeps]
                if user in kept.users and _root(node) is self._roots.get(owner):
                    kept.users.remove(user)
                    if not kept.users:
                        self._drop(node, sleeps)

    def _descend(self, node: _Node, tokens: tuple[int, ...]) -> _Node:
        """Return the node at the end of `tokens`, making it if necessary."""
        while tokens:
            child = node.children.get(tokens[0])
            if child is None:
                node.children[tokens[0]] = child = _Node(tokens, node)
            shared = common_length(child.edge, tokens)
            if shared < len(child.edge):
                upper = node.children[tokens[0]] = _Node(child.edge[:shared], node, {child.edge[shared]: child})
                child.edge, child.parent = child.edge[shared:], upper
                child = upper
            node, tokens = child, tokens[shared:]
        return node

    def _drop(self, node: _Node, sleeps: Sleeps, *, prune: bool = True) -> _Kept:
        kept = node.kept.pop(sleeps)
        del self._order[node, sleeps]
        self.bytes -= kept.bytes
        while prune and node.parent is not None and not node.kept and not node.children:
            del node.parent.children[node.edge[0]]
            node = node.parent
        return kept


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens at the start of both."""
    least = min(len(a), len(b))
    if a[:least] == b[:least]:
        return least
    return next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _root(node: _Node) -> _Node:
    while node.parent is not None:
        node = node.parent
    return node


def _alone(snapshot: Snapshot) -> Snapshot:
    """Copy the tensors that are slices of larger ones, which would keep all of these in memory."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    alone: Snapshot = tree_map_only(Tensor, own, snapshot)
    return alone._replace(start=alone.state) if snapshot.start is snapshot.waking else alone

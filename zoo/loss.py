"""Training with sleep: Algorithm 1 of "Language Models Need Sleep" (arXiv 2605.26099), and the rule that decides which chunks sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.inputs import check_count, check_ids, check_range, count_streams
from zoo.kernels.common.packed import unpack
from zoo.state import Answers, State

if TYPE_CHECKING:
    from zoo.model import Model

Recompute = Literal["nothing", "passes", "chunks"]


class Chunk(NamedTuple):
    """Tokens start .. stop - 1 of some sequences of a batch, at most one window, and what happens to them."""

    start: int
    stop: int
    read: int
    """Only tokens start .. read - 1 are run: nothing reads the last supervised token or the tokens after it."""
    awake: bool
    """True if it gets a wake pass, because it carries loss."""
    asleep: bool
    """True if it is consolidated before the next chunk."""
    follows: bool
    """True if the chunk before it was awake and so predicts its first token; after a sleep nothing does."""
    continues: bool
    """True if a later chunk of one of these sequences is run."""
    rows: Tensor | None = None
    """[R] int64, the sequences; None: all of the batch."""

    def of(self, x: Tensor) -> Tensor:
        """Return these sequences of x [B, ...]."""
        return x if self.rows is None else x[self.rows]


def chunks(loss_mask: Tensor, config: ModelConfig) -> list[Chunk]:
    """Cut sequences at multiples of the window and return what happens to each chunk, in order.

    A chunk without loss is consolidated, a chunk with loss gets one wake pass. Under `sleep_on: every`, each chunk gets a
    wake pass and is then consolidated from its start. The last chunk of a sequence with loss never sleeps, and nothing after it
    is run: nothing would read the results. Where sequences differ in this, there are several chunks with the same start.

    Args:
        loss_mask: [B, T], bool.
    """
    mask, every = loss_mask.cpu(), config.sleep_on == "every"
    size, length = mask.shape
    last = torch.where(mask, torch.arange(length, device="cpu"), -1).amax(dim=1)  # [B], the last token with loss
    found: list[Chunk] = []
    follows = torch.zeros(size, dtype=torch.bool, device="cpu")
    for start in range(0, int(last.max()) + 1, config.window or length):
        stop = min(start + (config.window or length), length)
        alive, continues = last >= start, last >= stop
        awake = alive & (every | mask[:, start:stop].any(dim=1))
        asleep = continues & (every | ~awake)
        kind = awake + 2 * asleep + 4 * follows
        for one in kind[alive].unique().tolist():
            rows = (alive & (kind == one)).nonzero()[:, 0]
            read, more = min(stop, int(last[rows].max())), bool(continues[rows].any())
            places = None if len(rows) == size else rows.to(loss_mask.device)
            found.append(Chunk(start, stop, read, bool(one & 1), bool(one & 2), bool(one & 4), more, places))
        follows = awake
    return found


def predicted(loss_mask: Tensor, plan: list[Chunk]) -> Tensor:
    """Return the tokens that carry loss, bool [B, T]: `loss_mask` without the tokens that have no prediction."""
    carries = loss_mask.clone()
    for chunk in plan:  # what follows them carries no loss
        if not chunk.follows:
            carries[slice(None) if chunk.rows is None else chunk.rows, chunk.start] = False
    return carries


class Streams(NamedTuple):
    """Sequences of a batch between two chunks."""

    rows: Tensor | None
    """As in `Chunk`."""
    state: State
    last: Tensor | None
    """Hidden state [R, 1, D] that predicts the next token; None after a sleep."""


def answers(
    model: Model,
    ids: Tensor,
    loss_mask: Tensor,
    *,
    loops: int | None = None,
    recompute: Recompute = "nothing",
    backward_chunks: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Answers:
    """Return the predictions that the loss scores; see `Model.answers`. Gradients cross chunks only through the state."""
    mask = _checked(ids, loss_mask, model.config.vocab_size)
    for name, value in {"loops": loops, "backward_chunks": backward_chunks}.items():
        if value is not None:
            check_count(name, value)
    if recompute not in get_args(Recompute):
        raise ZooError(f"recompute: {recompute!r}; allowed: {', '.join(get_args(Recompute))}")
    place = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    if cu_seqlens is not None:
        count_streams(ids, cu_seqlens)
        ids, mask, place = (unpack(x, cu_seqlens).to(x.dtype) for x in (ids, mask, place))
    plan = chunks(mask, model.config)
    starts = sorted({chunk.start for chunk in plan})
    if (loops or model.config.loops) > 1 and len(starts) > 1 and not any(chunk.asleep for chunk in plan):
        raise ZooError(
            f"loss_mask: every window carries loss, so {model.config.name} would never sleep; "
            "create it with sleep_on 'every', or with loops 1"
        )
    if backward_chunks is not None and any(chunk.continues for chunk in plan) and not all(chunk.rows is None for chunk in plan):
        raise ZooError(f"backward_chunks: {backward_chunks} needs sequences with loss in the same chunks; omit it")
    carries = predicted(mask, plan)
    if not carries.any():
        raise ZooError("loss_mask: marks no token that can be predicted (the first of a stream, or after a sleep, cannot)")
    streams, hidden = [Streams(None, model.init_state(ids.shape[0]), None)], []
    for number, start in enumerate(starts):
        before, streams = streams, []
        for chunk in (chunk for chunk in plan if chunk.start == start):
            state, last = _taken(before, chunk, ids)
            if backward_chunks is not None and (len(starts) - number) % backward_chunks == 0:
                state = tree_map_only(Tensor, Tensor.detach, state)
            state, last, scored = _run(model, chunk, ids, carries, state, last, loops, recompute)
            hidden += scored
            if chunk.continues:
                streams.append(Streams(chunk.rows, state, last))
    order = torch.cat([_places(carries, chunk) for chunk in plan])
    return Answers(model.logits(torch.cat(hidden)), place.flatten()[order], ids.flatten()[order])


def _run(
    model: Model, chunk: Chunk, ids: Tensor, carries: Tensor, start: State, last: Tensor | None, loops: int | None, recompute: Recompute
) -> tuple[State, Tensor | None, list[Tensor]]:
    """Run a chunk. Returns the state after it, the hidden state of its last token if awake, and those that predict tokens with loss."""
    piece, carries = chunk.of(ids)[:, chunk.start : chunk.read], chunk.of(carries)
    state, awake, scored = start, None, []
    if chunk.awake:
        outputs = [] if last is None else [last]
        if piece.shape[1]:
            h, state = awake = model.wake(piece, start, recompute=recompute != "nothing")
            outputs.append(h)
        first = chunk.start if chunk.follows else chunk.start + 1
        if outputs:
            before = torch.cat(outputs, dim=1)[:, : chunk.stop - first]  # each predicts the next token
            scored.append(before[carries[:, first : first + before.shape[1]]])
    if chunk.asleep:
        first_pass = awake if model.wakes_as_it_sleeps and recompute != "chunks" else None
        state = _consolidate(model, piece, start, loops, recompute, first_pass)
    elif chunk.continues:
        state = model.evict(state)
    return state, None if awake is None else awake[0][:, -1:], scored


def _taken(streams: list[Streams], chunk: Chunk, ids: Tensor) -> tuple[State, Tensor | None]:
    """Return the states of the sequences of a chunk, and the hidden states that predict their next tokens."""
    found = [one for one in streams if (one.last is not None) == chunk.follows]
    if len(found) == 1 and found[0].rows is chunk.rows is None:
        return found[0].state, found[0].last
    every = torch.arange(len(ids), device=ids.device)
    there = torch.cat([every if one.rows is None else one.rows for one in found])
    index = torch.zeros_like(every).index_copy(0, there, every[: len(there)])[every if chunk.rows is None else chunk.rows]

    def take(*parts: Any) -> Any:
        return torch.cat(parts)[index] if isinstance(parts[0], Tensor) else parts[0]

    state: State = tree_map(take, found[0].state, *(one.state for one in found[1:]))
    return state, take(*(one.last for one in found))


def _checked(ids: Tensor, loss_mask: Any, vocab_size: int) -> Tensor:
    """Return the mask as bool."""
    check_ids(ids)
    if not isinstance(loss_mask, Tensor) or loss_mask.device != ids.device:
        found = loss_mask.device if isinstance(loss_mask, Tensor) else type(loss_mask).__name__
        raise ZooError(f"loss_mask: {found}; want a tensor on {ids.device}, where ids are")
    if ids.shape != loss_mask.shape:
        raise ZooError(f"loss_mask {list(loss_mask.shape)} and ids {list(ids.shape)}: want the same [B, T]")
    mask = loss_mask.bool()
    if not torch.equal(mask.to(loss_mask.dtype), loss_mask):
        raise ZooError(f"loss_mask: {loss_mask.min().item()} to {loss_mask.max().item()}; allowed: bool, or 0 and 1")
    if ((ids < 0) | (ids >= vocab_size)).any():
        if int(ids.min()) < 0:
            raise ZooError(f"ids: {int(ids.min())} is not a token id; mark the tokens to predict in loss_mask instead of masking labels")
        check_range(ids, vocab_size)
    return mask


def _places(carries: Tensor, chunk: Chunk) -> Tensor:
    """Return the indices in ids.flatten() of the tokens of a chunk that carry loss, row by row."""
    rows, columns = chunk.of(carries)[:, chunk.start : chunk.stop].nonzero(as_tuple=True)
    rows = rows if chunk.rows is None else chunk.rows[rows]
    return rows * carries.shape[1] + chunk.start + columns


def _consolidate(
    model: Model, ids: Tensor, state: State, loops: int | None, recompute: Recompute, awake: tuple[Tensor, State] | None = None
) -> State:
    """Sleep, storing for the backward pass what `recompute` selects."""
    if recompute == "chunks":
        return checkpoint(_consolidate, model, ids, state, loops, "passes", use_reentrant=False)
    return model.consolidate(ids, state, loops=loops, awake=awake, recompute=recompute == "passes")

"""Training with sleep: Algorithm 1 of "Language Models Need Sleep" (arXiv 2605.26099), and the rule that decides which chunks sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.inputs import check_count, check_ids, check_range
from zoo.state import Answers, State

if TYPE_CHECKING:
    from zoo.model import Model

Recompute = Literal["nothing", "passes", "chunks"]


class Chunk(NamedTuple):
    """Tokens start .. stop - 1 of every sequence of a batch: at most one window."""

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


def chunks(loss_mask: Tensor, config: ModelConfig) -> list[Chunk]:
    """Cut sequences at multiples of the window and return what happens to each chunk.

    A chunk without loss is consolidated, a chunk with loss gets one wake pass. Under `sleep_on: every`, each chunk gets a
    wake pass and is then consolidated from its start. The last chunk with loss never sleeps, and nothing after it is run:
    nothing would read the results.

    Args:
        loss_mask: [B, T], bool.
    Raises:
        ZooError: rows disagree on which chunks carry loss, so they would have to sleep at different times.
    """
    length, every = loss_mask.shape[1], config.sleep_on == "every"
    columns = loss_mask.any(dim=0).nonzero()
    last = int(columns[-1]) if len(columns) else 0
    found: list[Chunk] = []
    for start in range(0, last + 1, config.window or length):
        stop = min(start + (config.window or length), length)
        rows = loss_mask[:, start:stop].any(dim=1)
        if not every and bool(rows.any()) != bool(rows.all()):
            raise ZooError(f"loss_mask: some rows have loss in chunk {len(found)} and others do not; such rows sleep at different times")
        awake = every or bool(rows.any())
        asleep = stop <= last and (every or not awake)
        found.append(Chunk(start, stop, min(stop, last), awake, asleep, follows=bool(found) and found[-1].awake))
    return found


def predicted(loss_mask: Tensor, plan: list[Chunk]) -> Tensor:
    """Return the tokens that carry loss, bool [B, T]: `loss_mask` without the tokens that have no prediction."""
    carries = loss_mask.clone()
    for chunk in plan:  # what follows them carries no loss
        if not chunk.follows:
            carries[:, chunk.start] = False
    return carries


def answers(
    model: Model,
    ids: Tensor,
    loss_mask: Tensor,
    *,
    loops: int | None = None,
    recompute: Recompute = "nothing",
    backward_chunks: int | None = None,
) -> Answers:
    """Return the predictions that the loss scores; see `Model.answers`. Gradients cross chunks only through the state."""
    mask = _checked(ids, loss_mask, model.config.vocab_size)
    for name, value in {"loops": loops, "backward_chunks": backward_chunks}.items():
        if value is not None:
            check_count(name, value)
    if recompute not in get_args(Recompute):
        raise ZooError(f"recompute: {recompute!r}; allowed: {', '.join(get_args(Recompute))}")
    plan = chunks(mask, model.config)
    if (loops or model.config.loops) > 1 and len(plan) > 1 and not any(chunk.asleep for chunk in plan):
        raise ZooError(
            f"loss_mask: every window carries loss, so {model.config.name} would never sleep; "
            "create it with sleep_on 'every', or with loops 1"
        )
    carries = predicted(mask, plan)
    if not carries.any():
        raise ZooError("loss_mask: marks no token that can be predicted (the first of a stream, or after a sleep, cannot)")
    state, last, hidden = model.init_state(ids.shape[0]), None, []
    for number, chunk in enumerate(plan):
        if backward_chunks is not None and (len(plan) - number) % backward_chunks == 0:
            state = tree_map_only(Tensor, Tensor.detach, state)
        piece, start, awake = ids[:, chunk.start : chunk.read], state, None
        if chunk.awake:
            outputs = [] if last is None else [last]
            if piece.shape[1]:
                h, state = awake = model.wake(piece, start, recompute=recompute != "nothing")
                outputs.append(h)
            first = chunk.start if chunk.follows else chunk.start + 1
            if outputs:
                before = torch.cat(outputs, dim=1)[:, : chunk.stop - first]  # each predicts the next token
                hidden.append(before[carries[:, first : first + before.shape[1]]])
        last = h[:, -1:] if awake is not None else None
        if chunk.asleep:
            first_pass = awake if model.wakes_as_it_sleeps and recompute != "chunks" else None
            state = _consolidate(model, piece, start, loops, recompute, first_pass)
        elif number < len(plan) - 1:
            state = model.evict(state)
    order = torch.cat([_places(carries, chunk) for chunk in plan])
    return Answers(model.logits(torch.cat(hidden)), order, ids.flatten()[order])


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
    rows, columns = carries[:, chunk.start : chunk.stop].nonzero(as_tuple=True)
    return rows * carries.shape[1] + chunk.start + columns


def _consolidate(
    model: Model, ids: Tensor, state: State, loops: int | None, recompute: Recompute, awake: tuple[Tensor, State] | None = None
) -> State:
    """Sleep, storing for the backward pass what `recompute` selects."""
    if recompute == "chunks":
        return checkpoint(_consolidate, model, ids, state, loops, "passes", use_reentrant=False)
    return model.consolidate(ids, state, loops=loops, awake=awake, recompute=recompute == "passes")

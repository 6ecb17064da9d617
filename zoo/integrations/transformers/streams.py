"""Rows of a batch as streams: padded rows, packed documents, and what `generate` carries from token to token."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zoo.errors import ZooError, counted
from zoo.model import Model
from zoo.schedule import Schedule, new_schedule
from zoo.sessions.session import Session


def as_streams(ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return one row per stream, padded on the right, where nothing reads the padding.

    Args:
        ids: [B, T] int64.
        attention_mask: [B, T], false where a row is padded, on either side.
        position_ids: [B, T]; a document that is packed into a row begins at each 0. Ignored if there is padding.
    Returns:
        ids [S, L], and for each its index in ids.flatten(), [S, L] int64, -1 for padding; None if the rows stay as they are.
    Raises:
        ZooError: a mask of another shape, or with padding between tokens.
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        if attention_mask.shape != ids.shape:
            raise ZooError(f"attention_mask: {list(attention_mask.shape)} for input_ids {list(ids.shape)}; want the same [B, T]")
        mask = attention_mask.bool()
        first, length = mask.byte().argmax(dim=1), mask.sum(dim=1)
        if not torch.equal(mask, (column >= first[:, None]) & (column < (first + length)[:, None])):
            raise ZooError("attention_mask: padding between tokens; want it on the left or on the right")
        if not first.any():
            return ids, None
        begin = first + ids.shape[1] * torch.arange(len(ids), device=ids.device)
    elif position_ids is not None:
        begins = (position_ids == 0).expand(ids.shape).clone()
        begins[:, 0] = True
        begin = begins.flatten().nonzero()[:, 0]
        if len(begin) == len(ids):
            return ids, None
        length = torch.cat([begin, begin.new_tensor([ids.numel()])]).diff()
    else:
        return ids, None
    column = torch.arange(int(length.max()), device=ids.device)
    place = torch.where(column < length[:, None], begin[:, None] + column, -1)
    return ids.flatten()[place.clamp(min=0)], place


class Group(NamedTuple):
    """Rows of a batch with the same number of tokens, which advance together."""

    rows: Tensor
    """Their indices in the batch, [n] int64."""
    padding: int
    """Number of tokens before the first of each row that the row does not read."""
    session: Session


class Streams:
    """A stream for each row of a batch. Each sleeps when its own window is full, and reads no padding.

    Args:
        when: a schedule such as "full" or "interval(512)"; see `zoo.schedule`.
    """

    is_compileable = False

    def __init__(self, model: Model, *, when: str | Schedule = "full") -> None:
        self.model, self.when = model, new_schedule(when)
        self.when.due(model.config.window)  # refuses a schedule that does not fit
        self.groups: list[Group] = []
        self.columns = 0
        """Number of tokens of the padded batch that have been read."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens of the padded batch that have been read: `generate` removes them from its inputs."""
        return self.columns

    def read(self, ids: Tensor, attention_mask: Tensor | None = None, *, last: bool = False) -> Tensor:
        """Read ids [B, T], which continue the streams. Returns logits [B, T, V], zeros where a row is padded.

        Args:
            attention_mask: [B, T], or [B, columns + T] with the tokens that have been read; false where a row is padded.
            last: return only the logits of the last token, [B, 1, V].
        Raises:
            ZooError: padding that is not on the left of the first tokens, or ids that do not fit the streams.
        """
        padding = _left_padding(ids, attention_mask)
        if not self.groups:
            for count in padding.unique().tolist():
                rows = (padding == count).nonzero()[:, 0]
                self.groups.append(Group(rows, count, Session(self.model, len(rows), when=self.when)))
        elif padding.any():
            raise ZooError("attention_mask: pads tokens that continue streams; pad the first tokens of a stream, on the left")
        if len(ids) != (streams := sum(len(group.rows) for group in self.groups)):
            raise ZooError(f"input_ids: {counted(len(ids), 'row')} for {counted(streams, 'stream')}")
        logits: Tensor | None = None
        for rows, pads, session in self.groups:
            start = 0 if self.columns else pads
            found = _read(session, ids[rows, start:], last=last)
            if logits is None:
                logits = found.new_zeros(len(ids), 1 if last else ids.shape[1], found.shape[-1])
            logits[rows, -found.shape[1] :] = found
        self.columns += ids.shape[1]
        assert logits is not None
        return logits

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue the stream of row beam_idx[i], as beam search does. Rows may only take those of their own prompt's length."""
        for rows, _, session in self.groups:
            place = (beam_idx[rows, None] == rows).nonzero()
            if len(place) != len(rows):
                raise ZooError(f"beam_idx: {beam_idx.tolist()}: row of another length")
            session.restore(tree_map_only(Tensor, partial(torch.index_select, dim=0, index=place[:, 1]), session.snapshot()))


def _read(session: Session, ids: Tensor, *, last: bool) -> Tensor:
    if last and ids.shape[1] > 1:
        session.read(ids)  # computes no logits of earlier tokens
        logits = session.snapshot().logits
        assert logits is not None
        return logits[:, None]
    return session.feed(ids)[:, -1:] if last else session.feed(ids)


def _left_padding(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return how many of the first tokens of each row are padding, [B]."""
    if attention_mask is None:
        return ids.new_zeros(len(ids))
    if attention_mask.ndim != 2 or len(attention_mask) != len(ids) or attention_mask.shape[1] < ids.shape[1]:
        raise ZooError(f"attention_mask: {list(attention_mask.shape)} for input_ids {list(ids.shape)}; want [B, T]")
    mask = attention_mask[:, -ids.shape[1] :].bool()
    padding = (~mask).sum(dim=1)
    if not torch.equal(mask, torch.arange(ids.shape[1], device=mask.device) >= padding[:, None]) or not mask[:, -1].all():
        raise ZooError("attention_mask: padding that is not on the left; want padding_side='left' in the tokenizer to generate")
    return padding

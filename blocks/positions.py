"""Positions of consecutive tokens in a stream, with the rotary angles, masks and padding that follow from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.blocks.rotary import TURN, Rope


class Positions:
    """Positions of T consecutive tokens. All layers and passes share one object, so its tables are computed once.

    Args:
        start: position of the first token: int, or int64 scalar tensor in an exported graph, or int64 [B], one per stream.
        length: T.
        valid: number of valid tokens (int64 scalar tensor); the remaining ones are padding at the end. None: all are valid.
        cu_seqlens: [S + 1] int32 or int64, boundaries of S sequences packed into one row, each continuing its own stream.
            None: every row is a sequence.
    """

    def __init__(
        self, start: int | Tensor, length: int, device: torch.device, valid: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> None:
        self.start = start
        self.length = length
        self.valid = valid
        self.cu_seqlens = cu_seqlens
        self.index = torch.arange(length, device=device)
        self._tables: dict[object, Tensor | tuple[Tensor, Tensor]] = {}
        self._sequences: list[Positions] = []
        self._whole: Positions | None = None

    @property
    def ragged(self) -> bool:
        """True if the streams are at different positions."""
        return isinstance(self.start, Tensor) and self.start.ndim == 1

    @property
    def end(self) -> int | Tensor:
        """Position after the last token; int64 [B] if the streams are at different positions."""
        return self.start + (self.length if self.cu_seqlens is None else self.cu_seqlens.diff().to(torch.int64))

    @property
    def position(self) -> Tensor:
        """Position of every token: [T], or [B, T] if the streams are at different positions."""
        if self.cu_seqlens is not None:
            first = self.start - self.cu_seqlens[:-1]
            return self.index + first.repeat_interleave(self.cu_seqlens.diff(), output_size=self.length)
        return (self.start[:, None] if isinstance(self.start, Tensor) and self.ragged else self.start) + self.index

    @property
    def tables(self) -> list[Tensor]:
        """The tensors that have been computed so far."""
        return [x for table in self._tables.values() for x in (table if isinstance(table, tuple) else (table,))]

    @property
    def sequences(self) -> list[Positions]:
        """Positions of each packed sequence."""
        assert self.cu_seqlens is not None
        if not self._sequences:
            lengths = self.cu_seqlens.diff().tolist()
            starts = self.start.tolist() if isinstance(self.start, Tensor) else [self.start] * len(lengths)
            self._sequences = [Positions(start, length, self.index.device) for start, length in zip(starts, lengths, strict=True)]
        return self._sequences

    def rotary(self, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the rotary angles (RoFormer, arXiv 2104.09864, eq. 15), computed in float32 or wider.

        Shape [T, pairs], or [B, 1, T, pairs] if the streams are at different positions.
        """
        key = ("rotary", rope, dtype)
        if key not in self._tables:
            wide = torch.promote_types(dtype, torch.float32)
            tokens = self._stream_length() if rope.type == "dynamic" else 0
            # an int64 product wraps around as an angle does: exact at any position
            angle = (self.position[..., None] * rope.steps(tokens, self.index.device, wide)).to(wide) * (2 * math.pi / TURN)
            angle = angle[:, None] if self.ragged and self.cu_seqlens is None else angle
            cos, sin = angle.cos(), angle.sin()
            if rope.magnitude != 1:
                cos, sin = cos * rope.magnitude, sin * rope.magnitude
            self._tables[key] = cos.to(dtype), sin.to(dtype)
        return self._tables[key]  # type: ignore[return-value]

    def part(self, begin: int, end: int) -> Positions:
        """Return the positions of tokens begin to end - 1, in the same pass."""
        part = Positions(self.start + begin, end - begin, self.index.device)
        part._whole = self._whole or self
        return part

    def _stream_length(self) -> int | Tensor:
        """Length of each token's stream at the end of this pass; broadcasts with `position`."""
        whole = self._whole or self
        end = whole.end if whole.valid is None else whole.start + whole.valid
        if self.cu_seqlens is not None:
            return end.repeat_interleave(self.cu_seqlens.diff(), output_size=self.length)  # type: ignore[union-attr]
        return end[:, None] if isinstance(end, Tensor) and self.ragged else end

    def band(self, past: int, reach: int | None) -> Tensor:
        """Return the attention mask of T new tokens over `past` cached tokens and themselves: bool [T, past + T].

        A token sees itself and the tokens before it, at most `reach` tokens in all (None: no limit).
        If the streams are at different positions, the mask is [B, 1, T, past + T]: caches are aligned at the end, and the
        padding before a stream's start is masked.
        """
        key = ("band", past, reach)
        if key not in self._tables:
            slot = torch.arange(past + self.length, device=self.index.device)
            behind = (past + self.index)[:, None] - slot
            seen = (behind >= 0) & (behind < reach) if reach is not None else behind >= 0
            if isinstance(self.start, Tensor) and self.ragged:
                seen = seen & (slot >= past - self.start[:, None, None, None])
            self._tables[key] = seen
        return self._tables[key]  # type: ignore[return-value]

    def without_padding(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] with zeros in place of padding."""
        if self.valid is None:
            return x
        return torch.where((self.index < self.valid).reshape(-1, *[1] * (x.ndim - 2)), x, torch.zeros((), dtype=x.dtype))

    def tail(self, x: Tensor, before: Tensor, newest: Tensor | None) -> Tensor:
        """Return the last K-1 valid inputs of a short convolution of x [B, T, C] preceded by `before` [B, C, K-1].

        Args:
            newest: the last K-1 inputs with padding counted, as the convolution returns them.
        """
        if self.valid is None:
            assert newest is not None
            return newest
        inputs = torch.cat([before, x.mT.to(before.dtype)], dim=-1)
        return inputs.index_select(-1, self.valid + torch.arange(before.shape[-1], device=x.device))

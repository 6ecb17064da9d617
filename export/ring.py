"""Window caches of fixed size, and states as named tensors: the inputs and outputs of graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.blocks.attention import KV
from zoo.blocks.mixer import parts, replace_parts
from zoo.blocks.positions import Positions
from zoo.export.operators import MICROSOFT
from zoo.state import State

PAST, PRESENT = "past_key_values", "present"  # onnxruntime-genai's names for input and output states


class RingKV(NamedTuple):
    """Keys (after rotation) and values in a ring of L slots, [B, Hkv, L, D] each: position p is stored in slot p mod L.

    Replaces `KV` in attention layers while they are traced. Entries never move; slots that are beyond `reach` or not yet
    written are masked.
    """

    key: Tensor
    value: Tensor

    def empty(self) -> RingKV:
        return RingKV(torch.zeros_like(self.key), torch.zeros_like(self.value))

    def keep(self, tokens: int) -> RingKV:
        return self

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, reach: int | None, scale: float | None = None
    ) -> tuple[Tensor, RingKV]:
        """Attend from q [B, H, T, D] to the cached and the new k, v [B, Hkv, T, D]; T is at most L."""
        if positions.valid is None:
            return self._attend_token(q, k, v, positions, reach, scale)
        return self._attend_piece(q, k, v, positions, positions.valid, reach, scale)

    def _attend_token(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, reach: int | None, scale: float | None
    ) -> tuple[Tensor, RingKV]:
        slots, position = self.key.shape[2], positions.position  # [B, 1]
        at = position[:, 0] % slots  # TensorRT has no circular mode
        ring = RingKV(_scatter(self.key, k, at), _scatter(self.value, v, at))
        visible = _visible((position - torch.arange(slots)) % slots, position, reach)
        return attention(q, *ring, visible[:, None, None, None], scale), ring

    def _attend_piece(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, valid: Tensor, reach: int | None, scale: float | None
    ) -> tuple[Tensor, RingKV]:
        behind = positions.index[:, None] - positions.index  # padding is at the end, so no valid token sees it
        visible = (behind >= 0) & _visible(behind, positions.index[:, None], reach)
        keys, values = k, v
        if isinstance(positions.start, Tensor):  # otherwise the window starts at 0 and the cache is empty
            past, age = self._past(positions, positions.start)
            visible = torch.cat([_visible(age, positions.start + positions.index[:, None], reach), visible], dim=-1)
            keys, values = torch.cat([past.key, k], dim=2), torch.cat([past.value, v], dim=2)
        return attention(q, keys, values, visible, scale), self._with_piece(k, v, positions, valid)

    def _past(self, positions: Positions, start: Tensor) -> tuple[RingKV, Tensor]:
        """Return the cached tokens before `start`, and how many positions each is behind each new token: [T, slots]."""
        slots = self.key.shape[2]
        return self, 1 + positions.index[:, None] + (start - 1 - torch.arange(slots)) % slots

    def _with_piece(self, k: Tensor, v: Tensor, positions: Positions, valid: Tensor) -> RingKV:
        """Return the ring with the first `valid` of the new tokens."""
        slots = self.key.shape[2]
        token = (torch.arange(slots) - positions.start) % slots  # index of the new token for each slot
        lands = (token < valid)[:, None]
        token = token.clamp(max=positions.length - 1)
        return RingKV(*(torch.where(lands, new.index_select(2, token), old) for new, old in ((k, self.key), (v, self.value))))

    @staticmethod
    def of(cache: KV, position: int, slots: int) -> RingKV:
        """Convert a growing cache of the tokens before `position` to a ring."""

        def ring(tokens: Tensor) -> Tensor:
            B, Hkv, S, D = tokens.shape
            slot = torch.arange(position - S, position, device=tokens.device) % slots
            return tokens.new_zeros(B, Hkv, slots, D).index_copy(2, slot, tokens)

        return RingKV(ring(cache.key), ring(cache.value))

    def ordered(self, position: int, tokens: int) -> KV:
        """Return the newest `tokens` tokens before `position`, oldest first."""
        slot = torch.arange(position - tokens, position) % self.key.shape[2]
        return KV(self.key[:, :, slot], self.value[:, :, slot])


class FilledKV(RingKV):
    """A ring that never turns: position p is in slot p. Only the slots that are filled are read."""

    def _attend_token(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, reach: int | None, scale: float | None
    ) -> tuple[Tensor, RingKV]:
        """Call GroupQueryAttention of com.microsoft, whose outputs are zero in the other slots unless they share memory with its inputs."""
        if k.shape != v.shape or k.dtype != torch.float32 or k.shape[-1] % 8:  # what its kernel on CPUs supports
            return super()._attend_token(q, k, v, positions, reach, scale)
        tokens = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        y, *ring = torch.onnx.ops.symbolic_multi_out(
            f"{MICROSOFT}::GroupQueryAttention",
            [*tokens, *self, positions.position[:, 0].int(), torch.tensor(self.key.shape[2], dtype=torch.int32)],
            {
                "num_heads": q.shape[1],
                "kv_num_heads": k.shape[1],
                "scale": float(scale or q.shape[-1] ** -0.5),
                "local_window_size": -1 if reach is None else reach,
            },
            dtypes=[q.dtype, k.dtype, v.dtype],
            shapes=[tokens[0].shape, self.key.shape, self.value.shape],
            version=1,
        )
        return y.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2), FilledKV(*ring)

    def _past(self, positions: Positions, start: Tensor) -> tuple[RingKV, Tensor]:
        filled = start.item()
        torch._check(filled >= 0)
        torch._check(filled <= self.key.shape[2])
        return FilledKV(*(cache[:, :, :filled] for cache in self)), start + positions.index[:, None] - torch.arange(filled)

    def _with_piece(self, k: Tensor, v: Tensor, positions: Positions, valid: Tensor) -> RingKV:
        if not isinstance(positions.start, Tensor):
            return super()._with_piece(k, v, positions, valid)
        first = positions.start.clamp(max=self.key.shape[2] - positions.length)  # padding may reach past the end
        token = positions.index + first - positions.start
        lands = ((token >= 0) & (token < valid))[:, None]
        ring = []
        for old, new in zip(self, (k, v), strict=True):
            piece = torch.where(lands, new.index_select(2, token.clamp(min=0)), old.index_select(2, first + positions.index))
            ring.append(_scatter(old, piece, first.expand(new.shape[0])))
        return FilledKV(*ring)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """Softmax attention of q [B, H, T, D] to k, v [B, Hkv, S, D] where visible, [T, S] or [B, 1, 1, T, S].

    Written as matrix products because TensorRT-RTX 1.7 cannot build ONNX Attention inside a Loop, nor in float32 for T > 1.
    """
    groups = q.unflatten(1, (k.shape[1], -1))
    scores = groups * (scale or q.shape[-1] ** -0.5) @ k[:, :, None].mT
    hidden = torch.zeros(visible.shape, dtype=scores.dtype).masked_fill(~visible, float("-inf"))  # adding is cheaper than selecting
    weights = (scores + hidden).softmax(-1, dtype=torch.float32).to(v.dtype)
    mixed: Tensor = weights @ v[:, :, None]
    return mixed.flatten(1, 2)


def _visible(age: Tensor, position: int | Tensor, reach: int | None) -> Tensor:
    """Mask of the tokens `age` positions before `position` that exist and are within reach."""
    exists = age <= position
    return exists if reach is None else exists & (age < reach)


def _scatter(cache: Tensor, new: Tensor, slot: Tensor) -> Tensor:
    """Write new [B, Hkv, 1, D] into slot [B] of cache [B, Hkv, L, D], as ONNX TensorScatter (graphs only)."""
    return torch.onnx.ops.symbolic("TensorScatter", (cache, new, slot), dtype=cache.dtype, shape=cache.shape, version=24)


def with_rings(state: State, slots: int, kind: type[RingKV] = RingKV) -> State:
    """Replace the growing caches of new streams with empty rings of `slots` slots."""

    def ring(cache: KV) -> RingKV:
        return kind(*(tensor.new_zeros(*tensor.shape[:2], slots, tensor.shape[3]) for tensor in cache))

    return with_caches(state, lambda i, cache: ring(cache) if isinstance(cache, KV) else cache)


def with_caches(state: State, replace: Callable[[int, Any], Any]) -> State:
    """Return the state with `replace(layer, cache)` for every KV cache, convolution tail and so on; see `replace_parts`."""
    return state._replace(window=tuple(replace_parts(cache, partial(replace, i)) for i, cache in enumerate(state.window)))


def pack(state: State, prefix: str, *, layers: range | None = None, window: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a state under onnxruntime-genai's names: `<prefix>.<layer>.recurrent_state`, `.conv_state`, `.key`, ...

    With wake loops, the second loop's layers are numbered after those of the first, and so on.

    Args:
        layers: include only these; default: all.
        window: include the window caches, not just the fast weights.
    """
    depth = len(state.fast)
    chosen = range(depth) if layers is None else layers
    named = {f"{prefix}.{i}.recurrent_state": fast for i, fast in enumerate(state.fast) if fast is not None and i in chosen}
    caches = [(i, cache) for i, cache in enumerate(state.window) if window and cache is not None and i % depth in chosen]
    return named | {f"{prefix}.{i}.{field}": x for i, cache in caches for part in parts(cache) for field, x in part._asdict().items()}


def unpack(named: Mapping[str, Tensor], prefix: str, like: State) -> State:
    """Return the state with the tensors of `named`; missing ones, and the position, come from `like`."""
    fast = tuple(named.get(f"{prefix}.{i}.recurrent_state", fast) for i, fast in enumerate(like.fast))

    def read(i: int, cache: Any) -> Any:
        return cache._make(named.get(f"{prefix}.{i}.{field}", own) for field, own in cache._asdict().items())

    return with_caches(like, read)._replace(fast=fast)

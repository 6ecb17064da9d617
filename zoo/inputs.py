"""Checks of what callers pass to a model: a ZooError of one line that names the argument, its value and what is allowed.

Only types, shapes, dtypes and devices are read: values on a GPU would cost a synchronisation. While a model is compiled or
exported, nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.blocks.mixer import mixers, parts
from zoo.errors import ZooError, counted
from zoo.kernels.common import packed
from zoo.state import State

if TYPE_CHECKING:
    from zoo.blocks.mixer import Mixer
    from zoo.blocks.positions import Positions
    from zoo.model import Model

Shape = tuple[int, ...]


def check_count(name: str, value: Any) -> None:
    """Refuse a value that is not an integer of at least 1."""
    if torch.compiler.is_compiling():
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ZooError(f"{name}: {value!r}; want an integer, at least 1")
    if value < 1:
        raise ZooError(f"{name}: {value} must be at least 1")


def check_flag(name: str, value: Any) -> None:
    """Refuse a value that is neither True nor False."""
    if not torch.compiler.is_compiling() and not isinstance(value, bool):
        raise ZooError(f"{name}: {value!r}; allowed: True, False")


def check_seed(seed: Any) -> None:
    """Refuse a seed that torch's generators do not all take."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ZooError(f"seed: {seed!r}; want an integer from 0 to 2**63 - 1")


def check_ids(ids: Any) -> None:
    """Refuse ids that are not [B, T] int64 with B and T at least 1."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(ids, Tensor):
        raise ZooError(f"ids: {type(ids).__name__}; want a tensor, [B, T] torch.int64")
    if ids.ndim != 2 or ids.dtype != torch.int64 or 0 in ids.shape:
        raise ZooError(f"ids: {list(ids.shape)} {ids.dtype}; want [B, T] torch.int64 with at least one row and at least one token")


def check_kept(ids: Tensor, logits_to_keep: Any) -> None:
    """Refuse a number of logits that is neither None nor an integer from 0 to the number of tokens of ids [B, T]."""
    if logits_to_keep is None or torch.compiler.is_compiling():
        return
    check_ids(ids)
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, Integral) or not 0 <= int(logits_to_keep) <= ids.shape[1]:
        raise ZooError(f"logits_to_keep: {logits_to_keep!r}; want an integer from 0 to the number of tokens, {ids.shape[1]}")


def count_streams(ids: Any, cu_seqlens: Any) -> int:
    """Return the number of streams that ids [B, T] continue: B, or the number of packed sequences."""
    check_ids(ids)
    return packed.streams(ids.shape[0], ids.shape[1], cu_seqlens)


def longest(ids: Any, cu_seqlens: Any) -> int:
    """Return the number of tokens of the longest stream."""
    count_streams(ids, cu_seqlens)
    return ids.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())


def check_packs(model: Model, cu_seqlens: Tensor | None) -> None:
    """Refuse packed sequences if a block of `model` cannot read them."""
    if cu_seqlens is not None and (loose := {kind for kind in model.config.pattern if not mixers.get(kind).packs}):
        raise ZooError(f"{model.config.name}: cu_seqlens: block '{min(loose)}' does not support packed sequences")


def check_one_window(model: Model, ids: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuse a stream of more tokens than one window holds."""
    window = model.config.window
    if window is not None and (given := longest(ids, cu_seqlens)) > window:
        raise ZooError(f"ids: {given} tokens are more than one window of {window}")


def check_room(model: Model, ids: Tensor, state: State, positions: Positions) -> None:
    """Refuse more tokens than fit into a window that restarts."""
    end = int(positions.end.max()) if isinstance(positions.end, Tensor) else positions.end
    if model.eviction.restarts and end > (window := model.config.window or 0):
        given = longest(ids, positions.cu_seqlens)
        more = f"{counted(given, 'token')} {'does' if given == 1 else 'do'} not fit"
        raise ZooError(f"ids: {more} into a window of {window} that holds {state.position}; consolidate it first")


def check_range(ids: Tensor, vocab_size: int, name: str = "ids") -> None:
    """Refuse ids outside the vocabulary. Reads them, which synchronises with a GPU."""
    least, most = (int(x) for x in ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ZooError(f"{name}: from {least} to {most}; the vocabulary is 0 to {vocab_size - 1}")


def look_up(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Return the embeddings [B, T, D] of ids [B, T]. Raises a ZooError where torch finds ids that it cannot read."""
    try:
        h: Tensor = embedding(ids)
    except (IndexError, RuntimeError):
        weight = getattr(embedding, "weight", ids)
        if ids.device != weight.device:
            raise ZooError(f"ids: on {ids.device}; the model is on {weight.device}") from None
        if ids.is_cpu:
            check_range(ids, len(weight))
        raise
    if ids.is_meta and not h.is_meta:  # torch returns memory that nothing has written
        raise ZooError(f"ids: on {ids.device}; the model is on {h.device}")
    return h


def check_awake(model: Model, ids: Tensor, awake: tuple[Tensor, State] | None, cu_seqlens: Tensor | None) -> None:
    """Refuse the result of a wake pass over `ids` from which no sleep of `model` can continue."""
    if awake is None:
        return
    if not model.wakes_as_it_sleeps:
        raise ZooError(f"awake: the wake pass of {model.config.name} is not the first pass of a sleep; omit `awake`")
    if not isinstance(awake, tuple) or len(awake) != 2 or not isinstance(awake[0], Tensor):
        raise ZooError(f"awake: {type(awake).__name__}; want hidden states and a State, the result of `wake` for these ids")
    if awake[0].shape[:2] != ids.shape:
        raise ZooError(f"awake: hidden states {list(awake[0].shape)} for ids {list(ids.shape)}; want the result of `wake` for these ids")
    checked_state(model, awake[1], ids, count_streams(ids, cu_seqlens))


def checked_state(model: Model, state: State, ids: Tensor, streams: int) -> State:
    """Return `state`, which must be a state of `streams` streams of `model`, to be continued with ids [B, T]."""
    if torch.compiler.is_compiling():
        return state
    mixers: list[Mixer] = [block.mixer for block in model.blocks]  # type: ignore[misc]
    dtypes = tuple(mixer.dtype for mixer in mixers)
    if dtypes not in model.state_forms:
        model.state_forms[dtypes] = StateForm.of(model.init_state())
    # window caches are in the dtype that the model computes in, which mixed precision may change
    model.state_forms[dtypes].check(state, streams, lambda: look_up(model.embed, ids).dtype)
    return state


class StateForm(NamedTuple):
    """Shape and dtype of each tensor of a state, without the batch dimension. A size of 0 stands for any size."""

    fast: tuple[tuple[Shape, torch.dtype] | None, ...]
    window: tuple[tuple[list[type], list[tuple[Shape, torch.dtype]]], ...]
    """Types of each window cache and of its parts, and the form of its tensors."""

    @staticmethod
    def of(state: State) -> StateForm:
        """Return the form of the states that grow from `state`, the state of new streams."""
        return StateForm(
            tuple(None if s is None else (tuple(s.shape[1:]), s.dtype) for s in state.fast),
            tuple((_types(cache), [(tuple(x.shape[1:]), x.dtype) for part in parts(cache) for x in part]) for cache in state.window),
        )

    def check(self, state: Any, streams: int, computes_in: Callable[[], torch.dtype] | None = None) -> None:
        """Refuse a state of another model, of another number of streams or of other dtypes.

        Args:
            computes_in: returns another dtype that window caches may have.
        """
        if not isinstance(state, State):
            raise ZooError(f"state: {type(state).__name__}; want a State, such as the `state` of an Output")
        if len(state.fast) != len(self.fast) or len(state.window) != len(self.window):
            raise ZooError(f"state: of {counted(len(state.fast), 'layer')}; the model has {len(self.fast)}")
        _check_position(state.position, streams)
        for i, (fast, want) in enumerate(zip(state.fast, self.fast, strict=True)):
            if fast is None and want is None:
                continue
            if fast is None or want is None:
                raise ZooError(f"state: of another model: layer {i} has {'no ' if fast is None else ''}fast weights")
            if not _fits(fast, *want, streams):
                raise _misfit(f"state: fast weights of layer {i}", fast, *want, streams)
        for i, (cache, (types, form)) in enumerate(zip(state.window, self.window, strict=True)):
            if type(cache) is not types[0] or _types(cache) != types:
                raise ZooError(f"state: of another model: the window cache of layer {i} is a {type(cache).__name__}")
            for x, (shape, dtype) in zip((x for part in parts(cache) for x in part), form, strict=True):
                if x.dtype != dtype and computes_in is not None and not x.is_meta:
                    dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else computes_in()
                if not _fits(x, shape, dtype, streams):
                    raise _misfit(f"state: window cache of layer {i}", x, shape, dtype, streams)


def _check_position(position: Any, streams: int) -> None:
    """Refuse a position that is neither a number nor one for each stream."""
    if isinstance(position, Tensor):
        fits, shown = position.dtype == torch.int64 and position.shape == (streams,), f"{list(position.shape)} {position.dtype}"
    else:
        fits, shown = type(position) is not bool and isinstance(position, Integral) and int(position) >= 0, repr(position)
    if not fits:
        raise ZooError(f"state: position {shown}; want an integer, at least 0, or [{streams}] torch.int64")


StateForms = dict[tuple[torch.dtype, ...], StateForm]
"""The form of a model's states for the dtypes of its mixers."""


def _types(cache: Any) -> list[type]:
    return [type(cache), *map(type, parts(cache))]


def _fits(x: Tensor, shape: Shape, dtype: torch.dtype, streams: int) -> bool:
    given = x.shape
    if x.dtype != dtype or len(given) != len(shape) + 1 or given[0] != streams:
        return False
    return given[1:] == shape or all(b in (0, a) for a, b in zip(given[1:], shape, strict=True))


def _misfit(name: str, x: Tensor, shape: Shape, dtype: torch.dtype, streams: int) -> ZooError:
    if _fits(x, shape, x.dtype, streams):
        return ZooError(f"{name}: {x.dtype}; want {dtype}")
    return ZooError(f"{name}: {list(x.shape)}; want [{', '.join(str(size or 'any') for size in (streams, *shape))}] for these ids")

"""A session in one safetensors file, whose header identifies the model; any other model refuses it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from zoo import __version__
from zoo.blocks.mixer import parts, replace_parts
from zoo.checkpoints.checksum import metadata, read_verified
from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.files import replacing
from zoo.sessions.sleeping_model import SleepingModel
from zoo.sessions.snapshot import Counts, Snapshot, opening
from zoo.state import State

FORMAT = "zoo.session.1"


def write_file(path: Path, model: SleepingModel, snapshot: Snapshot, more: Mapping[str, str] | None = None) -> None:
    """Write `snapshot` to `path` atomically, replacing an existing file. Raises ZooError.

    Args:
        more: further fields of the header.
    """
    tensors = {"ids": snapshot.ids, "said": snapshot.pending, **_pack("state", model.plain(snapshot.state))}
    if snapshot.logits is not None:
        tensors["logits"] = snapshot.logits
    if snapshot.hidden:
        tensors["hidden"] = torch.cat(snapshot.hidden, dim=1)
    if snapshot.start is not snapshot.state:
        tensors |= _pack("start", model.plain(snapshot.start))
    header = {
        "format": FORMAT,
        **identity(model),
        "versions": json.dumps({"sleep-zoo": __version__, "torch": torch.__version__}),
        "positions": json.dumps([snapshot.state.position, snapshot.start.position]),
        "counts": json.dumps(snapshot.counts._asdict()),
        "hidden": json.dumps(bool(snapshot.hidden)),
        "sleeps": json.dumps(snapshot.sleeps),
        **(more or {}),
    }
    if snapshot.logits is None and snapshot.counts.tokens:  # a call was interrupted
        header["logits"] = "none"
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write_bytes(save(tensors, metadata(tensors, header)))


def read_file(path: Path, model: SleepingModel) -> Snapshot:
    """Read the snapshot that `write_file` wrote for the same model.

    Raises:
        ZooError: the file is missing, damaged, no session, or of a model with another config or other weights.
    """
    tensors, header = read_verified(path)
    if header.get("format") != FORMAT:
        raise ZooError(f"{path}: format: {header.get('format')!r}; want a session file, {FORMAT!r}")
    for key, own in identity(model).items():
        if header.get(key) != own:
            raise ZooError(f"{path}: {key}: the session is for {header.get(key)!r}, this model is {own!r}")
    try:
        positions, counts = json.loads(header["positions"]), Counts(**json.loads(header["counts"]))
        fresh = opening(model, tensors["ids"].shape[0])
        device = fresh.ids.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        like = model.plain(fresh.state)
        state = model.ringed(_unpack("state", tensors, like)._replace(position=positions[0]))
        start = model.ringed(_unpack("start", tensors, like)._replace(position=positions[1])) if _has("start", tensors) else state
        ids, pending, logits = _tensor("ids", tensors, fresh.ids), _tensor("said", tensors, fresh.ids), None
        if counts.tokens and header.get("logits") != "none":
            logits = _tensor("logits", tensors, tensors["logits"].new_zeros(len(ids), model.config.vocab_size))
        hidden = None if ids.shape[1] else fresh.hidden
        if json.loads(header["hidden"]) and fresh.hidden is not None:
            hidden = (_tensor("hidden", tensors, tensors["hidden"].new_zeros(*ids.shape, model.config.d_model)),)
        sleeps = tuple((int(at), int(loops)) for at, loops in json.loads(header.get("sleeps", "[]")))
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ZooError(f"{path}: incomplete session: {error}") from None
    return Snapshot(state, start, ids, logits, pending, hidden, counts, sleeps)


def identity(model: SleepingModel) -> dict[str, str]:
    """Return what must match for a state to be usable: the model's config and its weights."""
    return {"model": model.config.name, "config": config_hash(model.config), "weights": model.fingerprint}


def config_hash(config: ModelConfig) -> str:
    """Hash of every field that affects what a model computes."""
    return hashlib.sha256(json.dumps(config.computed(), sort_keys=True).encode()).hexdigest()[:16]


def _pack(prefix: str, state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _named(prefix, state) if tensor is not None}


def _named(prefix: str, state: State) -> Iterator[tuple[str, Tensor | None]]:
    for i, fast in enumerate(state.fast):
        yield f"{prefix}.fast.{i}", fast
    for i, cache in enumerate(state.window):
        for part in parts(cache):
            for field, tensor in part._asdict().items():
                yield f"{prefix}.window.{i}.{field}", tensor


def _has(prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(f"{prefix}.") for name in tensors)


def _unpack(prefix: str, tensors: Mapping[str, Tensor], like: State) -> State:
    """Read a state from `tensors`, with the layout of `like`, a new stream's state."""
    fast = tuple(None if s is None else _tensor(f"{prefix}.fast.{i}", tensors, s) for i, s in enumerate(like.fast))

    def read(i: int, part: Any) -> Any:
        return part._make(_cached(f"{prefix}.window.{i}.{field}", tensors, tensor) for field, tensor in part._asdict().items())

    window = tuple(replace_parts(cache, partial(read, i)) for i, cache in enumerate(like.window))
    return State(fast, window, like.position)


def _cached(name: str, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Read a tensor of a window cache, which is in another dtype if the session ran in mixed precision."""
    stored = tensors[name].dtype
    mixed = stored.is_floating_point and like.is_floating_point()
    return _tensor(name, tensors, like.to(stored) if mixed else like)


def _tensor(name: str, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Read a tensor with the shape of `like`, larger only where a dimension of `like` is 0."""
    tensor = tensors[name]
    if (
        tensor.dtype != like.dtype
        or len(tensor.shape) != len(like.shape)
        or any(a != b != 0 for a, b in zip(tensor.shape, like.shape, strict=True))
    ):
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}")
    return tensor

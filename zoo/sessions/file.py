"""A stream in one safetensors file. Its header says which model it belongs to; no other model takes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.files import replacing
from zoo.sessions.snapshot import Counts, Moment, Sleeper, opening
from zoo.state import State

FORMAT = "zoo.session.1"
SAMPLES = 64  # values of each weight that tell one model from another


def write_file(path: Path, model: Sleeper, moment: Moment) -> None:
    """Write `moment` to `path`, whole or not at all, in place of what is there. Raises ZooError."""
    tensors = {"ids": moment.ids, "said": moment.said, **_pack("state", _plain(model, moment.state))}
    if moment.logits is not None:
        tensors["logits"] = moment.logits
    if moment.hidden:
        tensors["hidden"] = torch.cat(moment.hidden, dim=1)
    if moment.start is not moment.state:
        tensors |= _pack("start", _plain(model, moment.start))
    header = {
        "format": FORMAT,
        **_identity(model),
        "versions": json.dumps({"sleep-zoo": version("sleep-zoo"), "torch": torch.__version__}),
        "positions": json.dumps([moment.state.position, moment.start.position]),
        "counts": json.dumps(moment.counts._asdict()),
        "hidden": json.dumps(bool(moment.hidden)),
    }
    content = save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, header)
    try:
        with replacing(path) as file:
            file.write_bytes(content)
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror}") from None


def read_file(path: Path, model: Sleeper) -> Moment:
    """The moment that `write_file` wrote for this very model.

    Raises:
        ZooError: the file is missing, damaged or no session, or belongs to a model of another config or other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ZooError(f"{path}: cannot be read: {error}") from None
    if header.get("format") != FORMAT:
        raise ZooError(f"{path}: format: {header.get('format')!r}; want a session's file, {FORMAT!r}")
    for key, own in _identity(model).items():
        if header.get(key) != own:
            raise ZooError(f"{path}: {key}: the session is of {header.get(key)!r}, and this model is {own!r}")
    try:
        positions, counts = json.loads(header["positions"]), Counts(**json.loads(header["counts"]))
        fresh = opening(model, tensors["ids"].shape[0])
        device = fresh.ids.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        like, ringed = _plain(model, fresh.state), getattr(model, "ringed", lambda state: state)
        state = ringed(_unpack("state", tensors, like)._replace(position=positions[0]))
        start = ringed(_unpack("start", tensors, like)._replace(position=positions[1])) if _has("start", tensors) else state
        ids, said, logits = _take("ids", tensors, fresh.ids), _take("said", tensors, fresh.ids), None
        if counts.tokens:
            logits = _take("logits", tensors, tensors["logits"].new_zeros(len(ids), model.config.vocab_size))
        hidden = None if ids.shape[1] else fresh.hidden
        if json.loads(header["hidden"]) and fresh.hidden is not None:
            hidden = (_take("hidden", tensors, tensors["hidden"].new_zeros(*ids.shape, model.config.d_model)),)
        return Moment(state, start, ids, logits, said, hidden, counts)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ZooError(f"{path}: not a whole session: {error}") from None


def _plain(model: Sleeper, state: State) -> State:
    """The state as `zoo.Model` has it; exported graphs keep caches of fixed size."""
    return model.plain(state) if hasattr(model, "plain") else state


def _identity(model: Sleeper) -> dict[str, str]:
    return {"model": model.config.name, "config": config_hash(model.config), "weights": fingerprint(model)}


def config_hash(config: ModelConfig) -> str:
    """Of all that decides what a model computes."""
    fields = config.model_dump(mode="json", exclude={"name", "about", "hub", "upstream"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model: Sleeper) -> str:
    """Of a few values of every weight; exported graphs know that of the model they were made of."""
    if not isinstance(model, nn.Module):
        return str(getattr(model, "fingerprint", type(model).__name__))
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        values = weight.detach().flatten()
        places = torch.linspace(0, len(values) - 1, min(SAMPLES, len(values)), dtype=torch.float64).long()  # float32 counts to 2**24
        some = values[places].float().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _pack(prefix: str, state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _named(prefix, state) if tensor is not None}


def _named(prefix: str, state: State) -> Iterator[tuple[str, Tensor | None]]:
    for i, fast in enumerate(state.fast):
        yield f"{prefix}.fast.{i}", fast
    for i, cache in enumerate(state.window):
        for field, tensor in ({} if cache is None else cache._asdict()).items():
            yield f"{prefix}.window.{i}.{field}", tensor


def _has(prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(f"{prefix}.") for name in tensors)


def _unpack(prefix: str, tensors: Mapping[str, Tensor], like: State) -> State:
    """The state in `tensors`, of the form of `like`, a fresh one."""
    fast = tuple(None if s is None else _take(f"{prefix}.fast.{i}", tensors, s) for i, s in enumerate(like.fast))
    window: list[Any] = []
    for i, cache in enumerate(like.window):
        fields = {} if cache is None else cache._asdict()
        window.append(cache and cache._make(_take(f"{prefix}.window.{i}.{field}", tensors, tensor) for field, tensor in fields.items()))
    return State(fast, tuple(window), like.position)


def _take(name: str, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """A tensor of the same form, longer only where a fresh one is empty."""
    tensor = tensors[name]
    if (
        tensor.dtype != like.dtype
        or len(tensor.shape) != len(like.shape)
        or any(a != b != 0 for a, b in zip(tensor.shape, like.shape, strict=True))
    ):
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}")
    return tensor

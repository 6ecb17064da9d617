"""Compare a model that sleeps with its parent and with itself without sleep, on the same held-out sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.checkpoints.own import configure, load
from zoo.config import ModelConfig
from zoo.costs import describe, window_bytes
from zoo.errors import ZooError
from zoo.model import Model
from zoo.products import fast_bfloat16
from zoo.tasks import Task
from zoo.text.tokenizers import ByteTokenizer
from zoo.training.evaluate import evaluate


class Arm(NamedTuple):
    """One line of the comparison: weights, and how they are run."""

    name: str
    folder: Path
    fields: Mapping[str, Any]
    """Config fields that replace those of the folder."""


def arms(folder: Path, fields: Mapping[str, Any], parent: Path | None, loops: int | None = None) -> list[Arm]:
    """Return the arms of the comparison.

    Args:
        folder, fields: folder of the model, and the config fields to replace.
        parent: folder of the weights that it was made from; default: its own.
        loops: passes per sleep of the last arm; default: as trained.
    Raises:
        ZooError: the model does not sleep.
    """
    config = configure(folder, fields)
    if config.window is None:
        raise ZooError(f"--compare: {config.name} never sleeps (evict: {config.evict}); add for example loops=2 evict=hard window=512")
    origin, name = (folder, "own weights") if parent is None else (parent, "parent")
    awake = {"loops": 1, "window": config.window, "sleep_on": config.sleep_on}
    return [
        Arm(f"{name}, full attention", origin, {"loops": 1, "evict": "none"}),
        Arm(f"{name}, sliding window", origin, {**awake, "evict": "sliding"}),
        Arm(f"{name}, hard eviction", origin, {**awake, "evict": "hard", **_inserted(origin, config)}),
        Arm("this model, N = 1", folder, {**fields, "loops": 1}),
        Arm("this model", folder, {**fields, "loops": loops or config.loops}),
    ]


def _inserted(origin: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the fields that insert the model's additional blocks, which have no effect yet, into a parent without fast weights."""
    before = configure(origin, {})
    added = set(config.pattern) - set(before.pattern)
    return {"layers": config.layers, "blocks": {kind: config.blocks[kind] for kind in added if kind in config.blocks}} if added else {}


def comparison(
    entries: list[Arm],
    task: Task,
    sequences: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    tokenizer: ByteTokenizer | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Evaluate every arm on the same sequences.

    Returns:
        For each arm its name, folder, evict, window and loops, with the loss, perplexity, bits_per_byte, accuracy and loss_by_window
        of `evaluate`, tokens_per_second and state_bytes (the peak of one stream); or `refused`, why it cannot run.
    """
    lengths = [task.batch(seed, n, 1, "test").ids.shape[1] for n in range(min(sequences, task.held_out() or sequences))]
    lines = []
    for number, arm in enumerate(entries):
        line: dict[str, Any] = {"name": arm.name, "folder": str(arm.folder)}
        try:
            model = load(arm.folder, device=device, dtype=dtype, **arm.fields)
            with fast_bfloat16(model):
                evaluate(model, task, 1, seed=seed)  # compiles kernels and fills caches
                since = time.perf_counter()
                results = evaluate(model, task, sequences, seed=seed, tokenizer=tokenizer)
                seconds = time.perf_counter() - since
            advance((number + 1) * sequences)
        except ZooError as error:
            lines.append({**line, "refused": str(error)})
            continue
        line |= {field: getattr(model.config, field) for field in ("evict", "window", "loops")}
        line |= {field: results[field] for field in ("loss", "perplexity", "bits_per_byte", "accuracy", "loss_by_window")}
        line |= {"tokens_per_second": round(sum(lengths) / seconds), "state_bytes": state_bytes(model, max(lengths))}
        lines.append(line)
    return lines


def state_bytes(model: Model, tokens: int) -> int:
    """Return the peak bytes of state of one stream of `tokens` tokens: fast weights and window caches."""
    return describe(model).state_bytes + window_bytes(model, min(tokens, model.config.window or tokens))

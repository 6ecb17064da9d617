"""The work of `zoo eval`: find a model, its data and its tokenizer, and evaluate or compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.checkpoints.companions import has_tokenizer
from zoo.checkpoints.own import configure, load
from zoo.console import progress_bar, spinner
from zoo.devices import usable_device
from zoo.errors import ZooError
from zoo.products import BATCH, fast_bfloat16, fast_products
from zoo.tasks import new_task
from zoo.tasks.text import Text
from zoo.text.tokenizers import load_tokenizer
from zoo.training.compare import arms, comparison
from zoo.training.evaluate import evaluate
from zoo.training.held_out import held_out_task
from zoo.training.trained import find


def evaluate_folder(
    path: Path,
    fields: dict[str, Any],
    *,
    data: Path | None = None,
    length: int | None = None,
    sequences: int | None = None,
    seed: int | None = None,
    loops: int | None = None,
    compare: bool = False,
    parent: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Evaluate the model at `path`, on the held-out data of its run or in a file.

    Args:
        fields: config fields to replace.
        data: as `held_out_task` reads it.
        sequences, seed: largest number of sequences, and their seed; default: those of the run, else 2,048 and 0.
        compare: compare with `parent` (default: the run's initial weights, else its own) and with no sleep; see `comparison`.
    Returns:
        The results of `evaluate` or of `comparison`, with the folder, the step of its weights and the passes per sleep as trained.
    Raises:
        ZooError: an option that has no effect, data that does not fit, or as `load`.
    """
    usable_device(device, meta=False)
    trained = find(path)
    config = configure(trained.folder, fields)
    if data is None and trained.run is None:
        raise ZooError(f"{path}: not a training run, whose task names held-out data; give --data")
    for option, value, wants, there in (
        ("length", length, "--data", data is not None),
        ("seed", seed, "no --data, which is read in order", data is None),
        ("parent", parent, "--compare", compare),
    ):
        if value is not None and not there:
            raise ZooError(f"--{option}: {value}: needs {wants}")
    if loops is not None and config.window is None:
        raise ZooError(f"--loops: {loops}; {config.name} never sleeps (evict: {config.evict})")
    if data is not None:
        task = held_out_task(data, trained.folder, config, trained.run, length)
    else:
        assert trained.run is not None
        task = new_task(trained.run.task)
        if isinstance(task, Text):
            task = task.model_copy(update={"epochs": True})  # random sequences would overlap
    run = trained.run if data is None else None
    sequences = sequences or (run.eval_sequences if run else 2048)
    sequences = min(sequences, task.held_out() or sequences)
    if task.loss_everywhere and config.window is not None:
        fields = {"sleep_on": "every", **fields}
    has_text = task.is_text and (has_tokenizer(trained.folder) or config.vocab_size == 256)
    tokenizer = load_tokenizer(trained.folder, config.vocab_size) if has_text else None
    about = {"folder": str(trained), "step": trained.step, "trained_loops": configure(trained.folder, {}).loops}
    given: Any = {"seed": seed if seed is not None else run.seed if run else 0, "tokenizer": tokenizer}
    if compare:
        entries = arms(trained.folder, fields, parent or trained.parent, loops)
        with fast_products(config.d_model, device, BATCH), progress_bar("comparing", len(entries) * sequences) as advance:
            lines = comparison(entries, task, sequences, device=device, dtype=dtype, advance=advance, **given)
        return {**about, "task": str(task), "sequences": sequences, "arms": lines}
    with spinner(f"loading {trained.folder}"):
        model = load(trained.folder, device=device, dtype=dtype, **fields)
    with fast_products(config.d_model, device, BATCH), fast_bfloat16(model), progress_bar("evaluating", sequences) as advance:
        return {**about, **evaluate(model, task, sequences, loops=loops, control=True, advance=advance, **given)}

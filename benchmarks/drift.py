"""Drift of a long stream: logits of a trained model in float32 beside float64, under hard and sliding eviction; docs/drift.png.

python -m benchmarks.drift [TOKENS]

Both read the same tokens, and each continues from its own states, so rounding could accumulate from sleep to sleep.
Beside it: the difference that the rounding of each window makes by itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._pytree import tree_map_only

import zoo
from benchmarks.measure import HERE, PLOTS, RESULTS, console, machine
from zoo.config import validate
from zoo.files import replacing
from zoo.training.config import TrainConfig
from zoo.training.loop import train

WINDOW = 128
RUN = {
    "overrides": {"layers": "attn gdn", "d_model": 32, "d_ff": 64, "vocab_size": 256, "sleep_on": "every"},
    "steps": 100,
    "batch_size": 8,
    "lr": 1e-2,
    "log_every": 50,
    "eval_sequences": 32,
}
Curves = dict[str, list[float]]  # a value for each window: "stream", "window" and "logit", see `drift`
POLICIES = {"hard": f"hard{WINDOW}", "sliding": f"slide{WINDOW}"}


def write_text(folder: Path) -> dict[str, str]:
    """Write the bytes of this repository's sources as tokens: half of the files to train on, the other half held out."""
    files = sorted(path for layer in ("blocks", "export", "kernels", "zoo") for path in (HERE.parent / layer).rglob("*.py"))
    for split, half in (("train", files[::2]), ("test", files[1::2])):
        np.save(folder / f"{split}.npy", np.frombuffer(b"".join(path.read_bytes() for path in half), dtype=np.uint8))
    return {split: str(folder / f"{split}.npy") for split in ("train", "test")}


def trained(policy: str, files: dict[str, str], folder: Path) -> tuple[zoo.Model, float]:
    """Train a model to predict the next byte. Returns it and its held-out accuracy."""
    task = {"name": "text", **files, "vocab": 256, "length": 2 * WINDOW, "width": WINDOW}
    config = validate(TrainConfig, {**RUN, "task": task, "model": f"gdn4-sleep4-{POLICIES[policy]}"}, "drift")
    results = train(config, folder / policy)
    return zoo.load(folder / policy), results["accuracy"]


@torch.no_grad()
def drift(model: zoo.Model, ids: Tensor) -> Curves:
    """Read the stream ids: [1, T] in both dtypes, with a sleep after each window.

    Returns, for each window, the largest difference of logits between the streams; the same if float32 reads the window from the
    state of float64, so that only the rounding of this window remains; and the largest logit.
    """
    exact = zoo.create(model.config, dtype="float64")
    exact.load_state_dict(model.state_dict())
    narrow_state, state = model.init_state(), exact.init_state()
    found: Curves = {"stream": [], "window": [], "logit": []}
    for window in ids.split(WINDOW, dim=1):
        logits = exact(window, state).logits
        rounded = tree_map_only(Tensor, Tensor.float, state)
        for name, start in (("stream", narrow_state), ("window", rounded)):
            found[name].append((model(window, start).logits - logits).abs().max().item())
        found["logit"].append(logits.abs().max().item())
        narrow_state, state = (m.consolidate(window, start) for m, start in ((model, narrow_state), (exact, state)))
        if len(found["logit"]) % 100 == 0:
            console.print({"windows": len(found["logit"]), **{name: float(np.max(values)) for name, values in found.items()}})
    return found


def draw(curves: dict[str, Curves]) -> None:
    """Draw docs/drift.png, a panel for each policy."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (policy, found) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
        for name, label in (("stream", "stream: rounding since the first token"), ("window", "rounding of this window alone")):
            axes.semilogy(WINDOW / 1000 * np.arange(1, len(found[name]) + 1), found[name], linewidth=0.6, label=label)
        axes.set(title=policy, xlabel="thousands of tokens read", ylabel="largest difference of logits")
        axes.label_outer()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(PLOTS / "drift.png", dpi=120)


def summary(policy: str, accuracy: float, found: Curves) -> dict[str, Any]:
    """Return the row of a policy in results/drift.json."""
    largest = {name: {"median": float(np.median(values)), "most": float(np.max(values))} for name, values in found.items()}
    return {"policy": policy, "windows": len(found["stream"]), "accuracy": accuracy, **largest}


def main(tokens: int = 200_000) -> None:
    torch.set_num_threads(1)
    curves, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        files = write_text(Path(folder))
        ids = torch.from_numpy(np.load(files["test"])[None, :tokens].astype(np.int64))
        for policy in POLICIES:
            model, accuracy = trained(policy, files, Path(folder))
            curves[policy] = drift(model, ids)
            rows.append(summary(policy, accuracy, curves[policy]))
            console.print(rows[-1])
    draw(curves)
    with replacing(RESULTS / "drift.json") as file:
        file.write_text(json.dumps({"rows": rows, **machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

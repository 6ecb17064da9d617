"""Drift of a long stream: logits of a trained model in float32 beside float64, under hard and sliding eviction; docs/drift.png.

python -m benchmarks.drift [TOKENS]

Both read the same tokens, and each continues from its own states, so rounding could accumulate from sleep to sleep.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import zoo
from benchmarks.measure import PLOTS, RESULTS, console
from zoo.config import validate
from zoo.files import replacing
from zoo.tasks import new_task
from zoo.training.config import TrainConfig
from zoo.training.loop import train

NODES = 48
RUN = {
    "task": {"name": "cycle", "nodes": NODES, "hops": 1},
    "overrides": {"layers": "(attn gdn)*2", "d_model": 32, "d_ff": 64, "blocks": {"attn": {"heads": 2}, "gdn": {"heads": 2}}},
    "steps": 300,
    "batch_size": 32,
    "lr": 5e-3,
    "log_every": 50,
}
POLICIES = {"hard": f"hard{NODES}", "sliding": f"slide{NODES}"}
PIECE = 500


def trained(policy: str) -> tuple[zoo.Model, float]:
    """Train a model; returns it and its held-out accuracy."""
    config = validate(TrainConfig, {**RUN, "model": f"gdn4-sleep4-{POLICIES[policy]}"}, "drift")
    with tempfile.TemporaryDirectory() as folder:
        results = train(config, Path(folder) / "run")
        return zoo.load(Path(folder) / "run"), results["accuracy"]


@torch.no_grad()
def drift(model: zoo.Model, tokens: int) -> list[float]:
    """Return the largest difference of logits in each piece of the stream."""
    task = new_task(RUN["task"])  # type: ignore[arg-type]
    ids = torch.from_numpy(task.batch(0, 0, -(-tokens // (2 * NODES)), "test").ids).reshape(1, -1)[:, :tokens]
    wide = zoo.create(model.config, dtype="float64")
    wide.load_state_dict(model.state_dict())
    sessions = zoo.Session(model), zoo.Session(wide)
    found = []
    for piece in ids.split(PIECE, dim=1):
        narrow, exact = (session.feed(piece) for session in sessions)
        found.append((narrow - exact).abs().max().item())
    return found


def main(tokens: int = 200_000) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = []
    for policy in POLICIES:
        model, accuracy = trained(policy)
        found = drift(model, tokens)
        places = PIECE * np.arange(1, len(found) + 1)
        axes.loglog(places, found, label=policy)
        row = {
            "policy": policy,
            "tokens": tokens,
            "accuracy": accuracy,
            "first": max(found[:2]),
            "last": max(found[-20:]),
            "most": max(found),
        }
        rows.append(row)
        console.print(row)
    axes.set(xlabel="tokens read", ylabel="largest difference of logits", title="float32 beside float64, a trained model that sleeps")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(PLOTS / "drift.png", dpi=120)
    with replacing(RESULTS / "drift.json") as file:
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""A training step with plain and with compiled blocks, and the time to the first one.

    python -m benchmarks.training_step

A step makes its batch, runs forward, backward and the optimiser. The contenders take turns; "errors" is the largest difference of their
losses. "MKL" computes products as PyTorch does by default, the others under the precision that `zoo train` finds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import quartiles, record
from zoo.training.config import TrainConfig, read_config
from zoo.training.loop import Trainer
from zoo.training.parallel import Team
from zoo.training.run_folder import RunFolder

HYBRID = {
    "model": "gdn4-sleep1",
    "overrides": {"layers": "(gdn*3 attn)*2", "d_model": 512, "d_ff": 1536, "vocab_size": 32_000, "evict": "none", "window": None},
    "task": {"name": "stdlib", "length": 512, "width": 512},
    "batch_size": 2,
    "steps": 1000,
}
RUNS = {
    "cycle6": (read_config("cycle6"), 50, 1.2),
    "GDN hybrid 45M, 2 x 512": (TrainConfig(**HYBRID), 8, 1.5),
    "gsm-jet2b-small": (read_config("gsm-jet2b-small"), 12, 1.1),
}
"""The config of a run, the number of steps and the intended speedup."""


def measure(name: str, config: TrainConfig, steps: int, target: float) -> list[dict[str, Any]]:
    """Return a row for a step and one for the first step."""
    taken: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    contenders = {"ours": True, "plain blocks": False, "plain blocks, MKL": False}
    with tempfile.TemporaryDirectory() as scratch:
        team, trainers = Team(torch.device("cpu")), {}
        for contender, compile in contenders.items():
            run = config.model_copy(update={"compile": compile})
            trainers[contender] = Trainer(run, RunFolder(Path(scratch) / contender, run.model_dump(mode="json"), team), team)
            trainers[contender].model.train()
        fast = trainers["ours"].measured_precision()
        for _ in range(steps):
            for contender, trainer in trainers.items():
                torch.set_float32_matmul_precision("highest" if contender.endswith("MKL") else fast)
                started = time.perf_counter()
                losses.setdefault(contender, []).append(trainer.step().score.loss)
                taken.setdefault(contender, []).append(time.perf_counter() - started)
    later = {contender: np.array(seconds[steps // 5 :]) for contender, seconds in taken.items()}
    others = [contender for contender in contenders if contender != "ours"]
    return [
        {
            "case": f"{name}: a step",
            "unit": "ms",
            "rounds": steps,
            "target": target,
            "times": {contender: quartiles(1e3 * seconds) for contender, seconds in later.items()},
            "ratios": {contender: quartiles(later[contender] / later["ours"]) for contender in others},
            "errors": {contender: float(np.abs(np.subtract(losses[contender], losses["ours"])).max()) for contender in others},
        },
        {
            "case": f"{name}: the first step",
            "unit": "s",
            "rounds": 1,
            "target": None,
            "times": {contender: quartiles(seconds[:1]) for contender, seconds in taken.items()},
            "ratios": {contender: quartiles([taken[contender][0] / taken["ours"][0]]) for contender in others},
        },
    ]


def main() -> None:
    record("training_step", [row for name, (config, steps, target) in RUNS.items() for row in measure(name, config, steps, target)])


if __name__ == "__main__":
    main()

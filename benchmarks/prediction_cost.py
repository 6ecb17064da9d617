"""Cost of a predicted token and of a sleep as a function of the number of passes N.

python -m benchmarks.prediction_cost [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

import zoo
from benchmarks.measure import compare, record

LOOPS = (1, 2, 4, 8, 16)
TOKENS = 24


def predict(model: zoo.Model) -> Callable[[], object]:
    """Return a function that generates TOKENS tokens after a sleep, always from the same state."""
    window = model.config.window or 1
    session = zoo.Session(model)
    session.feed(torch.zeros(1, window, dtype=torch.long))
    session.sleep()
    return lambda: list(session.fork().generate(torch.zeros(1, 1, dtype=torch.long), TOKENS - 1))


@torch.no_grad()
def main(name: str) -> None:
    models = {f"N = {n}": zoo.create(f"{name}-sleep{n}") for n in LOOPS}
    window = torch.zeros(1, models["N = 1"].config.window or 1, dtype=torch.long)
    token = compare(f"{name}, a token", {n: predict(m) for n, m in models.items()}, ours="N = 1", rounds=30, per=TOKENS, target=1)
    sleep = compare(f"{name}, a sleep", {n: partial(m.consolidate, window) for n, m in models.items()}, ours="N = 1", rounds=30)
    record("prediction_cost", [token, sleep])


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["gdn4"]))

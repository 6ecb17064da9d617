"""Cost of a sleep: N passes compared with N forward passes over the same window.

python -m benchmarks.sleep
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import zoo
from benchmarks.measure import compare, record

MODELS = {"gdn4, 8M": "gdn4", "depo10, 30M": "depo10"}
WINDOWS, LOOPS = (64, 256, 1024), (1, 2, 4, 8)


def forwards(model: zoo.Model, ids: Tensor, loops: int) -> None:
    """Run forward passes without the head, which a sleep does not use."""
    for _ in range(loops):
        model.wake(ids)


@torch.no_grad()
def main() -> None:
    rows = []
    for label, name in MODELS.items():
        for window in WINDOWS:
            model = zoo.create(f"{name}-hard{window}")
            ids = torch.zeros(1, window, dtype=torch.long)
            for loops in LOOPS if window == WINDOWS[1] else LOOPS[2:3]:
                # a session reuses its wake pass as the first pass; with N = 1 nothing remains
                for how, awake in {"": None, ", after the wake pass": model.wake(ids)}.items():
                    if loops > 1 or awake is None:
                        contenders = {
                            "ours": partial(model.consolidate, ids, loops=loops, awake=awake),
                            "N forward passes": partial(forwards, model, ids, loops),
                        }
                        rows.append(compare(f"{label}, window {window}, N = {loops}{how}", contenders, target=1))
    record("sleep", rows)


if __name__ == "__main__":
    main()

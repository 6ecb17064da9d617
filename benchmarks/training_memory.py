"""Memory of a training step by number of chunks and passes, for each setting of activation recomputation.

    python -m benchmarks.training_memory [MODEL [WINDOW [BATCH]]]

Counts the peak bytes of live tensors in one forward and backward pass on the CPU, without the model itself, after every
operation. "chunks" recomputes the most.
"""

from __future__ import annotations

import sys
import weakref

import torch
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from benchmarks.measure import record


class Live(TorchDispatchMode):
    """Track in `peak` the largest total size of storages that operations have allocated and not yet freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen | given:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak_bytes(model: zoo.Model, chunks: int, batch: int, loops: int, recompute: str) -> int:
    """Return the peak memory in bytes of a step with loss on the last chunk only, as in the tasks."""
    window = model.config.window
    ids = torch.randint(model.config.vocab_size, (batch, chunks * window), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -window // 2 :] = True
    model.zero_grad()
    with Live() as live:
        model.answers(ids, mask, loops=loops, recompute=recompute).losses().mean().backward()
    return live.peak


def main(name: str = "gdn4-sleep4", window: str = "64", batch: str = "2") -> None:
    model = zoo.create(name, window=int(window))
    hidden = int(batch) * int(window) * model.config.d_model * 4
    fast = sum(fast.nbytes for fast in model.init_state(int(batch)).fast if fast is not None)
    about = {"hidden_bytes": hidden, "fast_bytes": fast, "model": name, "window": int(window), "batch": int(batch)}
    rows = []
    for chunks, loops in track([(2, 1), (4, 1), (8, 1), (4, 2), (4, 4), (8, 4)], description="training steps"):
        peaks = {how: [peak_bytes(model, chunks, int(batch), loops, how) / 2**20] * 3 for how in ("chunks", "passes", "nothing")}
        ratios = {
            how: [value / ours for value, ours in zip(values, peaks["chunks"], strict=True)]
            for how, values in peaks.items()
            if how != "chunks"
        }
        case = f"{chunks} chunks, N = {loops}"
        rows.append({"case": case, "unit": "MiB", "ours": "chunks", "times": peaks, "ratios": ratios, **about})
    record("training_memory", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])

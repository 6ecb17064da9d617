"""Costs of a bundle besides its tokens: memory, the time to the first token, a large vocabulary, and other open bundles.

    python -m benchmarks.opening

Memory is what opening all graphs adds to a process, in units of weights.bin: resident pages, private and shared, with the mapped file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from benchmarks import stored
from benchmarks.llama import INSTALLED
from benchmarks.measure import compare, quartiles, record
from benchmarks.peers import pair
from zoo.export.bundle import export
from zoo.export.plan import Plan

MEMORY = """
import gc, re, sys
from pathlib import Path
import torch
from zoo.export.runtime import ExportedModel
from zoo.system import release_freed

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
ExportedModel(Path(sys.argv[2]))  # what onnxruntime itself needs
gc.collect()
release_freed()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = ExportedModel(folder)
peak = resident("VmHWM")
release_freed()
weights = (folder / "weights.bin").stat().st_size
print((peak - before) / weights, (resident("VmRSS") - before) / weights)
"""
TOKEN = """
import statistics, sys, time
import torch, zoo
sessions = [zoo.export.load(folder) for folder in sys.argv[1:]]
for session in sessions:
    session.feed(torch.arange(16)[None])
torch.ones(512, 512) @ torch.ones(512, 512)
taken = []
for _ in range(9):
    started = time.perf_counter()
    list(sessions[0].generate(None, 16))
    taken.append((time.perf_counter() - started) / 16)
print(statistics.median(taken))
"""
OURS = """
import sys, torch, zoo
next(zoo.export.load(sys.argv[1]).generate(torch.arange(16)[None], 1))
"""
THEIRS = """
import sys
import numpy as np
from benchmarks.llama import Llama
Llama(sys.argv[1], context=1024, threads=int(sys.argv[2])).read(np.arange(16)[None]).argmax(-1)
"""


def run(code: str, *arguments: str | Path | int) -> str:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def first_token(model: Any, ids: Tensor) -> None:
    next(zoo.Session(model).generate(ids, 1))


def memory(folders: dict[str, Path], tiny: Path) -> Iterator[dict[str, Any]]:
    for form, folder in folders.items():
        for what, value in zip(("peak", "settled"), run(MEMORY, folder, tiny).split(), strict=True):
            row = {"case": f"memory of all graphs, {form}: {what}", "unit": "x weights.bin", "rounds": 1, "target": None}
            yield row | {"times": {"ours": quartiles([float(value)])}, "ratios": {}}


def token(folders: list[Path]) -> dict[str, Any]:
    """Return a row for a token beside three other bundles, compared with one bundle alone."""
    taken = np.array([[1e3 * float(run(TOKEN, *folders[:count])) for count in (4, 1)] for _ in range(5)])
    row = {"case": "a token, four bundles open", "unit": "ms", "rounds": len(taken), "target": 1 / 1.1}
    times = {"ours": quartiles(taken[:, 0]), "one bundle": quartiles(taken[:, 1])}
    return row | {"times": times, "ratios": {"one bundle": quartiles(taken[:, 1] / taken[:, 0])}}


@torch.no_grad()
def main() -> None:
    rows: list[dict[str, Any]] = []
    torch.set_float32_matmul_precision(zoo.matmul_precision())
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        export(zoo.create("gdn4-sleep1-hard16", d_model=16, vocab_size=16), tiny := scratch / "tiny", verified=False)
        model = zoo.create("gdn4-sleep4-hard256", d_model=512, vocab_size=32_000, tie_embeddings=True)
        folders = {form: scratch / form for form in ("float32", "int8", "int4")}
        for form, folder in folders.items():
            export(model, folder, plan=Plan(weights=None if form == "float32" else form), verified=False)  # type: ignore[arg-type]
        rows += memory(folders, tiny)
        rows.append(token([folders["float32"], *folders.values()]))
        hybrid, _ = pair("GDN + attention 50M")
        stored.write(hybrid, scratch, ["F32"], 1024)
        contenders = {
            "ours": partial(run, OURS, scratch / "F32"),
            "llama.cpp": partial(run, THEIRS, scratch / "F32.gguf", torch.get_num_threads()) if INSTALLED else None,
        }
        rows.append(compare("a process until its first token", contenders, rounds=5, unit="s"))
    words = zoo.create("gdn4", d_model=512, layers="(gdn*3 attn)*2", vocab_size=152_000, tie_embeddings=True, evict="none", window=None)
    zoo.arrange_weights(words)
    ids = torch.randint(152_000, (1, 512), generator=torch.Generator().manual_seed(0))
    parts = {"ours": partial(first_token, words, ids), "blocks alone": partial(words.wake, ids)}
    rows.append(compare("first token after 512, vocabulary of 152,000", parts, rounds=5, target=1 / 1.1))
    record("opening", rows)


if __name__ == "__main__":
    main()

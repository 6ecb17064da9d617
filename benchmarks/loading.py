"""Time and memory of loading a checkpoint, compared with transformers, each load in a separate process.

    python -m benchmarks.loading [--all]

The files are in the page cache, as after a download; weights are bfloat16.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import peak_memory, quartiles, record
from benchmarks.peers import write

CHECKPOINTS = {"Mamba 370M": 1, "GDN + attention 2B": 1.1}
ROUNDS = 5


def load(package: str, folder: str) -> None:
    """Print the seconds until every weight has been read and the peak memory, both without the imports."""
    import torch

    if package == "ours":
        import zoo
        from zoo.checkpoints.family import families

        work = lambda: zoo.load(folder)  # noqa: E731
        zoo.create("gdn4")  # imports
        families.names()
    else:
        import transformers

        work = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # noqa: E731
        for architecture in transformers.AutoConfig.from_pretrained(folder).architectures:
            getattr(transformers, architecture)  # imports
    before, started = peak_memory(), time.perf_counter()
    model = work()
    total = sum(p.sum().item() for p in model.parameters())  # mapped memory costs nothing until it is read
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": peak_memory() - before, "sum": total}))


@click.command()
@click.option("--all", "large", is_flag=True, help="Include the checkpoint of 2B.")
def main(large: bool) -> None:
    rows = []
    for name in CHECKPOINTS if large else ["Mamba 370M"]:
        with tempfile.TemporaryDirectory() as folder:
            write(name, folder, "bfloat16")
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
            for _ in range(ROUNDS):
                for package, seen in runs.items():
                    command = [sys.executable, "-c", f"from benchmarks.loading import load; load({package!r}, {folder!r})"]
                    seen.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        for what, unit, scale in (("seconds", "s", 1), ("bytes", "x the file", size)):
            times = {package: [one[what] / scale for one in seen] for package, seen in runs.items()}
            ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["transformers"], strict=True)]
            row = {"case": f"{name}, {size / 1e9:.2f} GB: {what}", "unit": unit, "rounds": ROUNDS, "target": 1}
            rows.append(row | {"times": {k: quartiles(v) for k, v in times.items()}, "ratios": {"transformers": quartiles(ratios)}})
    record("loading", rows)


if __name__ == "__main__":
    main()

"""Growth of graphs and export time with the window and with the number of passes.

python -m benchmarks.export_growth
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import onnx
from rich.table import Table

import zoo
from benchmarks.measure import RESULTS, console, machine
from zoo.export.bundle import export

MODEL = "gdn4-sleep{loops}-hard{window}"
CASES = [(4, 64), (4, 512), (4, 2048), (1, 64), (16, 64)]  # loops, window
FILES = ("prediction.onnx", "consolidation.onnx")


def nodes(graph: onnx.GraphProto) -> int:
    """Count the nodes of a graph and of its loop bodies."""
    return sum(1 + sum(nodes(part.g) for part in node.attribute if part.type == part.GRAPH) for node in graph.node)


def main() -> None:
    columns = ("window", "passes", "seconds", "prediction nodes", "sleep nodes", "prediction bytes", "sleep bytes")
    shown, rows = Table(*columns, title=MODEL), []
    for loops, window in CASES:
        model = zoo.create(MODEL.format(loops=loops, window=window))
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            export(model, folder := Path(scratch) / "bundle", verified=False)
            row = {"window": window, "loops": loops, "seconds": round(time.perf_counter() - started, 1)}
            row["nodes"] = {file: nodes(onnx.load(folder / file, load_external_data=False).graph) for file in FILES}
            row["bytes"] = {file: (folder / file).stat().st_size for file in FILES}
        rows.append(row)
        shown.add_row(*map(str, (window, loops, row["seconds"], *row["nodes"].values(), *row["bytes"].values())))
    stamp = machine()
    with (RESULTS / "export_growth.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"model": MODEL, **row, **stamp}) + "\n" for row in rows)
    console.print(shown)


if __name__ == "__main__":
    main()

"""A model as a folder of files that run without PyTorch's modules: two graphs, their weights, and bundle.json."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from zoo.config import validate
from zoo.export import graphs
from zoo.export.manifest import CONSOLIDATION, PREDICTION, WEIGHTS, Bundle, GraphSpec, TensorSpec, digest
from zoo.export.runtime import ExportedModel
from zoo.export.target import targets
from zoo.export.verify import Parity, verify
from zoo.files import new_folder
from zoo.kernels.registry import ZooError
from zoo.model import Model


def export(model: Model, out: str | Path, *, target: str = "onnx", **options: Any) -> Parity:
    """Write `model` as a bundle to the new folder `out`, after it has been run against PyTorch.

    Args:
        model: on the CPU, in float32, with a window that `hard` or `sliding` bounds.
        options: of the target.
    Returns:
        How far the graphs are from PyTorch.
    Raises:
        ZooError: `out` exists, a model or target that does not fit, or graphs that differ from PyTorch by more than
            `zoo.export.verify.TOLERANCE`. Nothing is left behind.
    """
    goal = validate(targets.get(target), options, f"target {target}")
    _refuse_unfit(model)
    goal.check("float32", sum(tensor.nbytes for tensor in model.parameters()))
    with new_folder(Path(out)) as folder:
        bundle = write_onnx(model, folder)
        bundle.write(folder)
        parity = verify(model, ExportedModel(folder))
        goal.build(folder, bundle).write(folder)
        return parity


def _refuse_unfit(model: Model) -> None:
    name, evict = model.config.name, model.config.evict
    if evict not in ("hard", "sliding"):
        raise ZooError(f"{name}: evict: '{evict}' bounds no window, and a graph's caches are of fixed size; allowed: hard, sliding")
    for parameter, tensor in model.named_parameters():
        if (tensor.dtype, tensor.device.type) != (torch.float32, "cpu"):
            raise ZooError(f"{name}: {parameter} is {tensor.dtype} on {tensor.device}; allowed: torch.float32 on cpu (model.float().cpu())")


def write_onnx(model: Model, folder: Path) -> Bundle:
    """Write the graphs and their weights into an empty folder."""
    made = {PREDICTION: graphs.prediction(model), CONSOLIDATION: graphs.consolidation(model)}
    graphs.save(made, folder, WEIGHTS)
    config = model.config
    assert config.window is not None
    return Bundle(
        config=config,
        window=config.window,
        loops=config.loops,
        evict=config.evict,
        opset=graphs.OPSET,
        precision="float32",
        graphs={name: GraphSpec(inputs=_specs(graph.graph.inputs), outputs=_specs(graph.graph.outputs)) for name, graph in made.items()},
        versions={package: version(package) for package in ("sleep-zoo", "torch", "onnx-ir", "onnxscript", "onnxruntime")},
        sha256={name: digest(folder / name) for name in (*made, WEIGHTS)},
    )


def _specs(values: Iterable[Any]) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=value.name, dtype=str(value.dtype.numpy()), shape=[size if isinstance(size, int) else "batch" for size in value.shape]
        )
        for value in values
    ]

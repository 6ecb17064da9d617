"""Write a model as a bundle, a folder that runs without the PyTorch modules: graphs, weights and bundle.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints.companions import write_companions
from zoo.config import validate
from zoo.devices import usable_device
from zoo.errors import ZooError
from zoo.eviction import evictions
from zoo.export import assembly, graphs, trace
from zoo.export.genai import GENAI, genai_config
from zoo.export.manifest import (
    CODA,
    CONSOLIDATION,
    HEAD,
    PASS,
    PREDICTION,
    PREFILL,
    PRELUDE,
    SLEEPING,
    WEIGHTS,
    Bundle,
    GraphSpec,
    TensorSpec,
    digest,
)
from zoo.export.plan import PRECISIONS, Plan, check, slots
from zoo.export.products import store_transposed
from zoo.export.quantise import linear_weights, quantised, store_integers
from zoo.export.runtime import ExportedModel
from zoo.export.sleeping import SelfSleeping
from zoo.export.target import Target, targets
from zoo.export.verify import Parity, verify
from zoo.files import as_path, new_folder
from zoo.model import Model
from zoo.sessions.sleeping_model import fingerprint

import onnx_ir as ir  # isort: skip  (zoo.export.trace says what to install where it is missing)

Report = Callable[[str, str, float], None]
"""Callback after every stage of an export: stage, result, seconds."""


def export(
    model: Model,
    out: str | Path,
    *,
    plan: Plan = Plan(),  # noqa: B008  (frozen)
    target: str = "onnx",
    verified: bool = True,
    device: str | torch.device = "cpu",
    report: Report = lambda stage, result, seconds: None,
    **options: Any,
) -> Parity | None:
    """Write `model` as a bundle to the new folder `out`, verified against PyTorch.

    Args:
        model: a model on the CPU in float32, float16 or bfloat16.
        device: where PyTorch runs in the comparison.
        options: options of the target.
    Returns:
        The differences between the graphs and PyTorch; None without `verified`, or in bfloat16, which onnxruntime cannot run
        on a CPU.
    Raises:
        ZooError: `out` exists, the model, plan and target do not fit each other, or the graphs differ from PyTorch by more than
            `zoo.export.verify.TOLERANCE`. No files remain in that case.
    """
    goal = validate(targets.get(target), options, f"target {target}")
    device = usable_device(device, meta=False)
    out = as_path(out, "out")
    check(model, plan, out, verified)
    if not model.embed.weight.is_cpu:
        raise ZooError(f"{model.config.name}: the weights are on {model.embed.weight.device}; allowed: cpu")
    goal.check(PRECISIONS[model.embed.weight.dtype], plan)
    with torch.device("cpu"), new_folder(out) as folder:
        bundle = write_onnx(model, folder, plan, report, goal)
        bundle.write(folder)
        write_companions(model.companions, folder)
        parity = None
        if bundle.precision == "bfloat16":
            report("compare with PyTorch", "skipped, onnxruntime has no bfloat16 kernels on a CPU", 0.0)
        elif verified:
            started = time.perf_counter()
            parity = verify(model, ExportedModel(folder), device)
            report("compare with PyTorch", f"{parity.tokens} tokens", time.perf_counter() - started)
        started = time.perf_counter()
        built = goal.build(folder, bundle)
        if built is not bundle:
            built.write(folder)
            report(f"build for {target}", _size(folder, built.sha256.keys() - bundle.sha256.keys()), time.perf_counter() - started)
        return parity


def write_onnx(
    model: Model,
    folder: Path,
    plan: Plan = Plan(),  # noqa: B008
    report: Report = lambda *_: None,
    target: Target = Target(),  # noqa: B008
) -> Bundle:
    """Write the graphs and their weights to an empty folder."""
    made: dict[str, Any] = {}
    config, window = model.config, slots(model, plan)
    plan = plan.cut(window)
    for name, graph in _graphs(model, plan, window, target).items():
        started = time.perf_counter()
        made[name] = assembly.build(graph, plan.dialect)
        report(f"trace {name}", f"{sum(1 for _ in made[name].graph.all_nodes()):,} nodes", time.perf_counter() - started)
    if plan.self_sleeping:
        made[SLEEPING] = SelfSleeping(made, window).model()
    started = time.perf_counter()
    parameters: dict[str, Any] = {
        name: ir.tensor_adapters.TorchTensor(tensor.detach(), name=name) for name, tensor in model.state_dict().items()
    }
    linear = linear_weights(model)
    if plan.bits is None:
        store_transposed(made, linear)
    else:
        integers = {name: quantised(weight, plan.bits) for name, weight in linear.items()}
        store_integers(made, integers, plan.accuracy_level, whole_tables=not target.gathers_integers)
    trace.save(made, parameters, folder, WEIGHTS)
    if plan.dialect == "ort":
        (folder / GENAI).write_text(genai_config(config, window, model.companions), encoding="utf-8")
    files = sorted(file.name for file in folder.iterdir())
    report("write", _size(folder, files), time.perf_counter() - started)
    return Bundle(
        config=config,
        window=window,
        loops=config.loops,
        evict=config.evict,
        opset=trace.OPSET,
        precision=PRECISIONS[model.embed.weight.dtype],  # type: ignore[arg-type]
        plan=plan,
        fingerprint=fingerprint(model),
        graphs={name: GraphSpec(inputs=_specs(graph.graph.inputs), outputs=_specs(graph.graph.outputs)) for name, graph in made.items()},
        versions={package: version(package) for package in ("sleep-zoo", "torch", "onnx-ir", "onnxscript", "onnxruntime")},
        sha256={name: digest(folder / name) for name in files},
    )


def _graphs(model: Model, plan: Plan, window: int, target: Target) -> dict[str, Any]:
    """Return the graphs of a bundle by file name."""
    genai = plan.dialect == "ort"
    wanted: dict[str, Any] = {PREDICTION: graphs.Wake(model, window, 1, position_ids=genai)}
    if plan.prefill is not None:
        wanted[PREFILL] = graphs.Wake(model, window, plan.prefill, position_ids=genai)
        wanted[HEAD] = graphs.Head(model, window, plan.prefill)
    if not evictions.get(model.config.evict).uses_window:
        return wanted
    if plan.sleep != "per-pass":
        whole = plan.bits is not None and not target.shares_integers
        return wanted | {CONSOLIDATION: graphs.Sleep(model, window, plan.sleep == "unroll", whole)}
    coda = {CODA: graphs.Coda(model, window)} if model.coda else {}
    return wanted | {PRELUDE: graphs.Prelude(model, window), PASS: graphs.Pass(model, window)} | coda


def _specs(values: Iterable[Any]) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=value.name, dtype=str(value.dtype.numpy()), shape=[size if isinstance(size, int) else size.value for size in value.shape]
        )
        for value in values
    ]


def _size(folder: Path, names: Iterable[str]) -> str:
    return f"{sum((folder / name).stat().st_size for name in names):,} bytes"

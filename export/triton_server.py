"""Model repositories of Triton Inference Server, whose onnxruntime backend carries the states of every sequence (implicit state)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.export.bundle import export
from zoo.export.manifest import SLEEPING, Bundle, TensorSpec
from zoo.export.plan import Plan
from zoo.export.ring import PAST, PRESENT
from zoo.export.verify import Parity
from zoo.files import as_path, new_folder
from zoo.model import Model

CONFIG, VERSION = "config.pbtxt", "1"
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
SEQUENCES = 64  # read at the same time by an instance; more wait
IDLE = 600_000_000  # microseconds until the states of a silent sequence are dropped


def export_to_repository(model: Model, repository: str | Path, *, plan: Plan = Plan(), **options: Any) -> Parity | None:  # noqa: B008
    """Add `model` to a model repository: the new folder `repository`/NAME with config.pbtxt and, as version 1, a bundle.

    Args:
        model, plan, options: as in `zoo.export.export`; the bundle always has the graph that sleeps by itself.
    Raises:
        ZooError: as in `zoo.export.export`; also weights in bfloat16, which the server's onnxruntime backend does not have.
    """
    if model.embed.weight.dtype == torch.bfloat16:
        raise ZooError(f"{model.config.name}: dtype: the server's onnxruntime backend has no bfloat16; allowed: float32, float16")
    with new_folder(model_folder(model, repository)) as folder:
        parity = export(model, folder / VERSION, plan=plan.model_copy(update={"self_sleeping": True}), **options)
        (folder / CONFIG).write_text(config(Bundle.read(folder / VERSION)), encoding="utf-8")
        return parity


def model_folder(model: Model, repository: str | Path) -> Path:
    """Return the folder of a model in a model repository."""
    return as_path(repository, "repository") / model.config.name


def config(bundle: Bundle) -> str:
    """Return the config.pbtxt of a bundle's self-sleeping graph. The name of the model is that of its folder."""
    ids, *past = bundle.graphs[SLEEPING].inputs
    states = ",\n".join(map(_state, past))
    logits = bundle.graphs[SLEEPING].outputs[0]
    return f"""backend: "onnxruntime"
default_model_filename: "{SLEEPING}"
max_batch_size: 0
input [ {_tensor("name", ids)} ]
output [ {_tensor("name", logits)} ]
sequence_batching {{
  max_sequence_idle_microseconds: {IDLE}
  oldest {{ max_candidate_sequences: {SEQUENCES} }}
  state [
{states}
  ]
}}
"""


def _state(past: TensorSpec) -> str:
    zeros = past.model_copy(update={"name": "zeros"})
    return (
        f'    {{ output_name: "{past.name.replace(PAST, PRESENT)}" {_fields("input_name", past)}\n'
        f"      initial_state {_tensor('name', zeros, 'zero_data: true')} }}"
    )


def _tensor(name: str, spec: TensorSpec, *more: str) -> str:
    return f"{{ {' '.join([_fields(name, spec), *more])} }}"


def _fields(name: str, spec: TensorSpec) -> str:
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in spec.shape)
    return f'{name}: "{spec.name}" data_type: {TYPES[spec.dtype]} dims: [ {dims} ]'

"""Model repositories of Triton Inference Server: for its onnxruntime backend, which carries the states of every sequence
(implicit state), and for its Python backend, which runs this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.export.bundle import export
from zoo.export.manifest import SLEEPING, Bundle, TensorSpec
from zoo.export.plan import Plan
from zoo.export.python_backend import SEQUENCES
from zoo.export.ring import PAST, PRESENT
from zoo.export.verify import Parity
from zoo.files import as_path, new_folder
from zoo.model import Model

CONFIG, VERSION = "config.pbtxt", "1"
PYTHON_CONFIG = "configs/python.pbtxt"  # of tritonserver --model-config-name=python
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
CONTROLS = {"START": "SEQUENCE_START", "END": "SEQUENCE_END"}
MODEL = '"""One session for each sequence; see `zoo.export.python_backend`."""\n\nfrom zoo.export.python_backend import TritonPythonModel\n'
IDLE = 600_000_000  # microseconds until the states of a silent sequence are dropped


def export_to_repository(model: Model, repository: str | Path, *, plan: Plan = Plan(), **options: Any) -> Parity | None:  # noqa: B008
    """Add `model` to a model repository: the new folder `repository`/NAME with a config for each backend and, as version 1, a bundle.

    Args:
        model, plan, options: as in `zoo.export.export`; the bundle always has the graph that sleeps by itself.
    Raises:
        ZooError: as in `zoo.export.export`; also weights in bfloat16, which the server's onnxruntime backend does not have, and a
            name that is not one part of a path.
    """
    if model.embed.weight.dtype == torch.bfloat16:
        raise ZooError(f"{model.config.name}: dtype: the server's onnxruntime backend has no bfloat16; allowed: float32, float16")
    with new_folder(model_folder(model, repository)) as folder:
        parity = export(model, folder / VERSION, plan=plan.model_copy(update={"self_sleeping": True}), **options)
        bundle = Bundle.read(folder / VERSION)
        (folder / PYTHON_CONFIG).parent.mkdir()
        (folder / VERSION / "model.py").write_text(MODEL, encoding="utf-8")
        for name, text in {CONFIG: config(bundle), PYTHON_CONFIG: python_config(bundle)}.items():
            (folder / name).write_text(text, encoding="utf-8")
        return parity


def model_folder(model: Model, repository: str | Path) -> Path:
    """Return the folder of a model in a model repository. Raises ZooError: the model's name is not one part of a path."""
    place, name = as_path(repository, "repository"), model.config.name
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ZooError(f"name: {name!r} cannot be that of a folder in {place}; want a name without slashes, other than '.' and '..'")
    return place / as_path(name, "name")


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


def python_config(bundle: Bundle) -> str:
    """Return the config of the Python backend: the same input and output, without states."""
    ids, logits = bundle.graphs[SLEEPING].inputs[0], bundle.graphs[SLEEPING].outputs[0]
    controls = ",\n".join(
        f'    {{ name: "{name}" control [ {{ kind: CONTROL_{kind} int32_false_true: [ 0, 1 ] }} ] }}' for name, kind in CONTROLS.items()
    )
    return f"""backend: "python"
max_batch_size: 0
input [ {_tensor("name", ids)} ]
output [ {_tensor("name", logits)} ]
sequence_batching {{
  max_sequence_idle_microseconds: {IDLE}
  oldest {{ max_candidate_sequences: {SEQUENCES} }}
  control_input [
{controls},
    {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }} ] }}
  ]
}}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
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

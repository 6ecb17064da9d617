"""Load and save folders in the format of their upstream project."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.blocks.mixer import Options, mixers
from zoo.blocks.mlp import mlps
from zoo.checkpoints.checksum import metadata
from zoo.checkpoints.companions import write_companions
from zoo.checkpoints.family import Family, Link, expect, families, links
from zoo.checkpoints.plain import cast, empty_model, one_line, plain_tensors, wide_parameters
from zoo.checkpoints.stored import WEIGHTS, kept_dtype, open_folder, read_json
from zoo.config import BETWEEN_PASSES, ModelConfig, resolve, validate
from zoo.dtypes import DTYPES
from zoo.errors import ZooError, counted
from zoo.files import new_folder
from zoo.model import Model
from zoo.registry import nearest
from zoo.system import release_freed

CONFIG = "config.json"
ARCHITECTURE = (
    "vocab_size",
    "d_model",
    "pattern",
    "mlp",
    "mlp_width",
    "norm",
    "norm_eps",
    "tie_embeddings",
    "embed_scale",
    "logits_scale",
    "logits_cap",
)
"""Fields in which a model and the checkpoint of its weights must agree, besides the options of the blocks."""
BEHAVIOUR = ("wake_loops", "exit", "residual_in_fp32")
"""Fields and options of blocks in upstream's config.json that do not concern the weights."""
FORM = "zoo_form"
"""Field of `ModelConfig.upstream` that names the entry of `Family.forms` that was read. It is not part of config.json."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SLEEP = "sleep"
SLEEP_FIELDS = ("loops", "evict", "window", "span", "sleep_on", "carry", "feed_back", "loop_norm")
MOST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "total_ut_steps": 1_000}
"""Bounds on counts, checked before anything is allocated from them."""
ROTARY = r".*\.rotary_emb\.inv_freq$"
"""Frequencies that old checkpoints store; the config determines them."""
MAY_BE_ZERO = ("kernel_out.weight", "A_log", "o_proj.weight", "down_proj.weight", "input_bias", "recurrence_bias")
"""Matrices that may be all zero in a new model: outputs of residual branches, and biases by head."""


def read_config(folder: Path) -> ModelConfig:
    """Read the config.json of a folder as a ModelConfig.

    Raises:
        ZooError: no config.json, an unknown `model_type`, or a field that is missing or not supported.
    """
    file = folder / CONFIG
    config = _translate(read_json(file), str(file), folder.absolute().name)
    try:
        return resolve(config)
    except ZooError as error:
        raise ZooError(f"{file}: {error}") from None


def fill(model: Model, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
    """Replace every parameter of `model`, except those of inserted blocks, with the tensors in an upstream folder.

    Args:
        dtype: dtype of the parameters; default: as stored or, if that differs between tensors, the one in config.json. Norms and
            decays are then float32 or wider.
    Raises:
        ZooError: missing or damaged files, tensors that are missing, unexpected, of another shape, not finite or all zero, or a
            config.json of another architecture; names the file and the tensor. `model` is then unchanged.
    """
    content = read_json(folder / CONFIG)
    check_same_architecture(read_config(folder), model.config, folder / CONFIG)
    family, form = _family(content, str(folder / CONFIG)), None
    ours, wide = model.state_dict(), wide_parameters(model)
    with open_folder(folder, device) as stored:
        stored.drop(ROTARY)
        if unused := stored.drop(family.unused):
            what = ", ".join(sorted({re.match(family.unused, name)[0] + "*" for name in unused}))  # type: ignore[index]
            are, were = ("is", "was") if len(unused) == 1 else ("are", "were")
            some = f"{counted(len(unused), 'tensor')} {are} not part of the language model and {were} skipped"
            warnings.warn(f"{folder}: {some}: {what}", stacklevel=4)
        wanted = links(family, model)
        for name, other in family.forms.items():
            if not stored.shapes.keys() >= {name for link in wanted for name in link.names}:
                wanted, form = links(other, model), name
        if model.config.tie_embeddings and "lm_head.weight" in stored.shapes:
            wanted = list({link.theirs: link for link in [*wanted, Link("lm_head.weight", ("embed.weight",))]}.values())
        stored.check(folder, {name: shape for link in wanted for name, shape in _shapes(link, ours)}, model.config.name)
        if dtype is None and len(set(stored.dtypes.values())) > 1:
            stated = str(content.get("dtype") or content.get("torch_dtype")).removeprefix("torch.")
            dtype = DTYPES[stated] if stated in DTYPES else stored.main_dtype()
            rounded = [name for link in wanted for name in stored.rounded(link.names, kept_dtype(dtype, wide.issuperset(link.ours)))]
            if rounded:
                some = f"{counted(len(rounded), 'tensor')} of another dtype rounded to {str(dtype).removeprefix('torch.')}"
                warnings.warn(f"{folder}: {some}: {', '.join(rounded[:3])}{', ...' if len(rounded) > 3 else ''}", stacklevel=4)
        release_freed()  # of the names of tens of thousands of experts
        tensors: dict[str, Tensor] = {}
        for link in wanted:
            repeated = any(name in tensors for name in link.ours)
            kept = kept_dtype(dtype, wide.issuperset(link.ours))
            transient = repeated or link.groups > 1
            packed = stored.join(link.names, kept) if link.others else stored.read(link.theirs, kept, transient=transient)
            if packed.ndim > 1 and not link.ours[0].endswith(MAY_BE_ZERO) and not packed.any():
                raise ZooError(f"{stored.files[link.theirs]}: tensor '{link.theirs}' is all zero; the file is damaged")
            for name, part in zip(link.ours, link.unpack(packed, [ours[name].shape[0] for name in link.ours]), strict=True):
                if repeated and not torch.equal(tensors[name], part):
                    raise ZooError(f"{stored.files[link.theirs]}: tensor '{link.theirs}' differs from the embedding; the config ties them")
                tensors.setdefault(name, part)
    cast(model, tensors["embed.weight"].dtype).load_state_dict(tensors, assign=True, strict=False)
    if form is not None:
        model.config = model.config.model_copy(update={"upstream": {**model.config.upstream, FORM: form}})


def save(model: Model, path: Path) -> None:
    """Write config.json and model.safetensors in the format of the model's upstream project. Errors as in `zoo.save`.

    Sleep settings are written to config.json as `sleep`, which other readers ignore.
    """
    config, companions, tensors = model.config, model.companions, plain_tensors(model)
    if not config.upstream:
        raise ZooError(f"{config.name}: its config names no upstream project; format 'zoo' can hold it")
    family = _family(config.upstream, f"{config.name}: upstream")
    family = family.forms.get(str(config.upstream.get(FORM)), family)
    model = empty_model(config, config.name)
    if inserted := [i for i, block in enumerate(model.blocks) if block.inserted]:
        raise ZooError(f"{config.name}: layers {inserted} are not part of the upstream model; format 'zoo' can hold it")
    for name in sorted(BETWEEN_PASSES):
        if value := getattr(config, name):
            raise ZooError(f"{config.name}: {name}: {value} is not part of the upstream model; format 'zoo' can hold it")
    if family.write is None:
        raise ZooError(f"{config.name}: upstream: checkpoints of '{config.upstream['model_type']}' can be read but not written")
    wanted, written = links(family, model), _written_config(config, family)
    with new_folder(path) as folder:
        write_companions(companions, folder)
        packed: dict[str, Tensor] = {}
        for link in wanted:
            parts = link.parts([tensors[name] for name in link.ours])
            packed |= {name: part.contiguous() for name, part in zip(link.names, parts, strict=True)}
        if family.stores_tied_head and config.tie_embeddings:
            packed["lm_head.weight"] = packed["lm_head.weight"].clone()  # safetensors files cannot hold aliases
        save_file(packed, folder / WEIGHTS, metadata=metadata(packed))
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _translate(content: dict[str, Any], label: str, name: str) -> ModelConfig:
    """Read config.json. Raises ZooError, starting with `label`."""
    upstream = {key: value for key, value in content.items() if key not in (SLEEP, FORM)}
    family = _family(upstream, label)
    sleep = content.get(SLEEP, {})
    if not isinstance(sleep, dict) or not sleep.keys() <= set(SLEEP_FIELDS):
        raise ZooError(f"{label}: {SLEEP}: {sleep!r}; want an object of {', '.join(SLEEP_FIELDS)}")
    for key, most in MOST.items():
        for fields in (upstream, upstream.get("text_config")):
            value = fields.get(key, 1) if isinstance(fields, dict) else 1
            if type(value) is not int or not 0 < value <= most:
                raise ZooError(f"{label}: {key}: {value!r}; want a number from 1 to {most}")
    try:
        expect(upstream, "quantization_config", None)
        fields = family.read(upstream)
    except KeyError as error:
        raise ZooError(f"{label}: {error.args[0]}: is missing") from None
    except ZooError as error:
        raise ZooError(f"{label}: {error}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        raise ZooError(f"{label}: a field has the wrong type or size: {one_line(error)}") from None
    return validate(ModelConfig, {"name": name, "upstream": upstream, **fields, **sleep}, label)


def _family(upstream: Mapping[str, Any], label: str) -> Family:
    nameless = "lit_gpt" if "_mlp_class" in upstream else "mamba_ssm" if {"d_model", "n_layer"} <= upstream.keys() else None
    kind = upstream.get("model_type", nameless)
    if kind == "sleep_zoo":
        raise ZooError(f"{label}: save_pretrained wrote it; load it with transformers, and save model.zoo with zoo.save")
    if not isinstance(kind, str) or kind not in families.names():
        raise ZooError(f"{label}: model_type: {kind!r} is unknown; {nearest(str(kind), families.names())}")
    return families.get(kind)


def _written_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the config.json that was read, with all its other fields, if it still describes this model; otherwise a new one."""
    try:
        read = _translate(config.upstream, config.name, config.name)
        if not _differences(read, config, (*ARCHITECTURE, *BEHAVIOUR)):
            return {**read.upstream, **_sleep(read, config)}
    except ZooError:
        pass  # it only names the family, or no longer describes the model
    assert family.write is not None
    written = family.write(config)
    read = _translate(written, config.name, config.name)
    if differences := _differences(read, config, (*ARCHITECTURE, *BEHAVIOUR)):
        field, theirs, ours = differences[0]
        raise ZooError(f"{config.name}: {field}: {ours}: upstream has {theirs} and cannot express another value")
    tokens = {name: config.upstream[name] for name in TOKENS if name in config.upstream}
    return {**tokens, **written, **_sleep(read, config)}


def _sleep(read: ModelConfig, config: ModelConfig) -> dict[str, Any]:
    """Return the field of config.json that holds the sleep settings, if they differ from those of the config as `read`."""
    stated = config.model_dump(mode="json", include=set(SLEEP_FIELDS))
    fields = {field: stated[field] for field in SLEEP_FIELDS if getattr(config, field) != getattr(read, field)}
    return {SLEEP: fields} if fields else {}


def check_same_architecture(stored: ModelConfig, wanted: ModelConfig, file: Path) -> None:
    """Raise ZooError if a model with config `wanted` cannot use the weights that the config `stored` (from `file`) describes."""
    if differences := _differences(stored, wanted, ARCHITECTURE):
        field, theirs, ours = differences[0]
        raise ZooError(f"{file}: {field}: the checkpoint has {theirs}, {wanted.name} has {ours}")


def _differences(a: ModelConfig, b: ModelConfig, fields: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    """Return each field in which two configs differ, with both values, ignoring inserted blocks of `b`."""
    values = _comparable(a, fields), _comparable(b, fields)
    return [(key, values[0].get(key), values[1].get(key)) for key in {**values[0], **values[1]} if values[0].get(key) != values[1].get(key)]


def _comparable(config: ModelConfig, fields: tuple[str, ...]) -> dict[str, Any]:
    options = {kind: mixers.get(kind).Options(**config.blocks.get(kind, {})) for kind in set(config.pattern)}
    layers = [(kind, mlp) for kind, mlp in zip(config.pattern, config.mlp_pattern, strict=True) if not options[kind].inserted]
    kinds = [mlp if options[kind].mlp else "none" for kind, mlp in layers]
    stated = {field: getattr(config, field) for field in fields if field in ModelConfig.model_fields}
    stated |= {"pattern": [kind for kind, _ in layers], "mlp": kinds}
    values = {field: stated[field] for field in fields if field in stated}
    ignored = {"inserted", "decay_init", "conv_init", *BEHAVIOUR} - set(fields)
    for kind in sorted({kind for kind, _ in layers}):
        values |= _stated(config, options[kind], f"blocks.{kind}", ignored)
    for kind in sorted(set(kinds) - {"none"}):
        for name, value in mlps.get(kind).Options(**config.mlps.get(kind, {})).model_dump().items():
            values[f"mlps.{kind}.{name}"] = config.mlp_width if name == "width" and value is None else value
    # upstream rounds ratios such as 8/3
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}


def _stated(config: ModelConfig, options: Options, prefix: str, ignored: set[str]) -> dict[str, Any]:
    """Return every option by name, with the values that omitted ones stand for; options of parts follow one by one."""
    values: dict[str, Any] = {}
    for name, value in options.model_dump(exclude=ignored).items():
        part = getattr(options, name)
        if isinstance(part, Options):
            values |= _stated(config, part, f"{prefix}.{name}", ignored)
        else:
            values[f"{prefix}.{name}"] = _default(config, options, name) if value is None else value
    return values


def _default(config: ModelConfig, options: Any, name: str) -> Any:
    """Return the value that an omitted option stands for."""
    if name == "head_dim":
        return config.d_model // options.heads
    if name == "scale":
        return (options.head_dim or config.d_model // options.heads) ** -0.5
    if name in ("kv_heads", "value_heads"):
        return options.heads
    if name == "o_bias":
        return options.bias
    return -(-config.d_model // 16) if name == "dt_rank" else None


def _shapes(link: Link, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and shape of each upstream tensor of a link."""
    yield from zip(link.names, link.shapes(ours), strict=True)

"""The `zoo-export` command."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from zoo.cli import CONTEXT, exit_status
from zoo.errors import ZooError
from zoo.options import PATH, THREADS, refuse_twice

if TYPE_CHECKING:
    from zoo.model import Model


@click.command(context_settings=CONTEXT)
@click.argument("model", metavar="RUN_OR_NAME")
@click.argument("overrides", metavar="[FIELD=VALUE]...", nargs=-1)
@click.option("--target", default="onnx", show_default=True, help="Format of the bundle.")
@click.option("--out", type=PATH, help="New folder for the bundle.")
@click.option(
    "--triton-server",
    type=PATH,
    metavar="DIR",
    help="Model repository of Triton Inference Server to which the bundle is added, with --self-sleeping and a config per backend.",
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Weights and activations.  [default: as stored]")
@click.option("--dialect", type=click.Choice(["portable", "ort"]), default="portable", show_default=True, help="Operators of the graphs.")
@click.option(
    "--prefill",
    type=int,
    metavar="T",
    help="Largest piece of a prompt, read at once; 0: none.  [default: 128, at most a window]",
)
@click.option("--loops", type=int, metavar="N", help="Passes per sleep.  [default: as in the model]")
@click.option("--unroll", is_flag=True, help="Unroll the passes of a sleep instead of writing a Loop.")
@click.option("--per-pass", is_flag=True, help="Write a pass as a separate graph, for hosts that stop between passes.")
@click.option(
    "--self-sleeping", is_flag=True, help="Add sleeping.onnx, a graph that sleeps by itself, for hosts that only carry its states."
)
@click.option("--max-length", type=int, metavar="T", help="Maximum number of tokens in a stream, for models that never evict.")
@click.option("--int8", is_flag=True, help="Linear layers in 8 bits, their inputs rounded to 8 bits: fastest on a CPU.")
@click.option("--int4", is_flag=True, help="Linear layers in 4 bits, their inputs rounded to 8 bits: fastest on a CPU.")
@click.option("--weights-only-int8", is_flag=True, help="Linear layers in 8 bits, their inputs as they are.")
@click.option("--weights-only-int4", is_flag=True, help="Linear layers in 4 bits, their inputs as they are.")
@click.option("--device", default="cpu", show_default=True, help="Device that PyTorch uses in the comparison, such as cuda.")
@click.option("--no-verify", is_flag=True, help="Skip the comparison with PyTorch.")
@click.option("--verify-only", type=PATH, metavar="DIR", help="Only compare the bundle in DIR with the model.")
@click.option("--compute-capability", metavar="LIST", help="tensorrt: compute capabilities of GPUs to build for, such as 8.0,12.0.")
@click.option("--batch", type=int, nargs=3, metavar="MIN OPT MAX", help="tensorrt: streams per batch.  [default: 1 1 8]")
@click.option("--workspace", type=float, metavar="GIB", help="tensorrt: scratch memory per layer.  [default: 4]")
@click.option("--timing-cache", type=PATH, help="tensorrt: file of measurements that speeds up the next build.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of random weights, if the model is given by name."
)
@THREADS
def main(
    model: str,
    overrides: tuple[str, ...],
    out: Path | None,
    triton_server: Path | None,
    verify_only: Path | None,
    seed: int,
    device: str,
    loops: int | None,
    compute_capability: str | None,
    unroll: bool,
    per_pass: bool,
    self_sleeping: bool,
    int8: bool,
    int4: bool,
    weights_only_int8: bool,
    weights_only_int4: bool,
    prefill: int | None,
    **asked: Any,
) -> None:
    """Export a model as ONNX graphs or TensorRT engines, and verify them against PyTorch.

    RUN_OR_NAME is the folder of a model, of a training run or of an upstream checkpoint, hf://OWNER/NAME[@REVISION], or the name of
    a model (random weights).
    FIELD=VALUE replaces a field of its config, for example loops=4.
    """
    if sum(folder is not None for folder in (out, triton_server, verify_only)) != 1:
        raise click.UsageError("want one of --out DIR, --triton-server DIR and --verify-only DIR")
    if unroll and per_pass:
        raise click.UsageError("--unroll and --per-pass are mutually exclusive")
    forms = {"--int8": int8, "--int4": int4, "--weights-only-int8": weights_only_int8, "--weights-only-int4": weights_only_int4}
    chosen = [flag for flag, given in forms.items() if given]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} are mutually exclusive")
    asked["sleep"] = "unroll" if unroll else "per-pass" if per_pass else None
    asked["self_sleeping"] = True if self_sleeping or triton_server else None
    asked["weights"] = chosen[0][-4:] if chosen else None
    asked["exact_activations"] = True if weights_only_int8 or weights_only_int4 else None
    asked["compute_capability"] = compute_capability and compute_capability.split(",")
    if verify_only is not None and (refused := _given() - VERIFYING):
        raise click.UsageError(f"--verify-only compares the bundle as it is, without --{min(refused).replace('_', '-')}")
    with exit_status(), _options_in_errors():
        if prefill == 1:
            raise ZooError("--prefill: 1; want 0, or at least 2")
        refuse_twice("loops", loops, overrides)
        if "seed" in _given() and (model.startswith("hf://") or Path(model).is_dir()):
            raise ZooError(f"--seed: {seed}; the weights are those of {model}")
        overrides += () if loops is None else (f"loops={loops}",)
        if (place := out or triton_server) is not None:
            given = {name: value for name, value in asked.items() if value is not None}
            given |= {} if prefill is None else {"prefill": prefill or None}
            _write(model, overrides, seed, device, place, repository=triton_server is not None, **given)
        elif verify_only is not None:
            _compare(model, overrides, seed, device, verify_only)


VERIFYING = {"model", "overrides", "verify_only", "device", "loops", "seed", "threads"}
"""Parameters that have an effect under --verify-only."""


def _given() -> set[str]:
    """Return the parameters on the command line."""
    context = click.get_current_context()
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


@contextmanager
def _options_in_errors() -> Iterator[None]:
    """Name the options of the command in errors, in place of the fields of a `Plan`."""
    try:
        yield
    except ZooError as error:
        raise ZooError(re.sub(r"\b(max_length|self_sleeping)\b", lambda field: f"--{field[0].replace('_', '-')}", str(error))) from None


def _write(
    name: str,
    overrides: tuple[str, ...],
    seed: int,
    device: str,
    out: Path,
    *,
    repository: bool,
    target: str,
    no_verify: bool,
    dtype: str | None = None,
    **asked: Any,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from zoo.config import validate
    from zoo.console import spinner
    from zoo.devices import usable_device
    from zoo.export.bundle import export
    from zoo.export.manifest import Bundle
    from zoo.export.plan import Plan, check, state_bytes
    from zoo.export.target import targets
    from zoo.export.triton_server import VERSION, export_to_repository, model_folder
    from zoo.files import refuse_existing

    plan = validate(Plan, {field: value for field, value in asked.items() if field in Plan.model_fields}, "zoo-export")
    options = {field: value for field, value in asked.items() if field not in Plan.model_fields}
    if unknown := options.keys() - targets.get(target).model_fields.keys():
        raise ZooError(f"--{min(unknown).replace('_', '-')}: is not an option of target {target}")
    validate(targets.get(target), options, f"target {target}").check(dtype or "float32", plan)
    if not repository:
        refuse_existing(out)
    usable_device(device, meta=False)
    console = Console()
    started = time.perf_counter()

    def report(stage: str, result: str, seconds: float) -> None:
        console.print(f"{stage}: {result}, {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)

    shape = _model(name, overrides, seed, dtype, device="meta")
    place, write = (model_folder(shape, out), export_to_repository) if repository else (out, export)
    if repository:
        refuse_existing(place)
    check(shape, plan, place, verified=not no_verify)
    made = _model(name, overrides, seed, dtype)
    weights = sum(tensor.nbytes for tensor in made.parameters())
    report(
        made.config.name, f"{weights:,} bytes of weights, {state_bytes(made, plan):,} of states per stream", time.perf_counter() - started
    )
    with spinner(f"exporting {made.config.name}"):
        parity = write(made, out, plan=plan, target=target, verified=not no_verify, device=device, report=report, **options)
    if parity is not None:
        console.print(parity.table())
    table = Table("file", "bytes")
    for file in sorted(file for file in place.rglob("*") if file.is_file()):
        table.add_row(Text(str(file.relative_to(place))), f"{file.stat().st_size:,}")
    console.print(table)
    console.print(f"{place}: written in {time.perf_counter() - started:.1f} s", highlight=False, markup=False, soft_wrap=True)
    for engine, spec in Bundle.read(place / VERSION if repository else place).engines.items():
        console.print(f"{engine}: {spec}", highlight=False, markup=False, soft_wrap=True)


def _compare(name: str, overrides: tuple[str, ...], seed: int, device: str, folder: Path) -> None:
    from rich.console import Console

    from zoo.console import spinner
    from zoo.export.runtime import ExportedModel
    from zoo.export.verify import verify

    exported = ExportedModel(folder)
    model = _model(name, overrides, seed, exported.bundle.precision)
    theirs, ours = (config.model_dump(mode="json") for config in (exported.config, model.config))
    for field, value in theirs.items():
        if field not in ("name", "about", "upstream", "hub") and ours[field] != value:
            raise ZooError(f"{folder}: was exported from a model with {field}: {value}, not {ours[field]}")
    with spinner(f"comparing {folder} with PyTorch"):
        parity = verify(model, exported, device)
    Console().print(parity.table())


def _model(name: str, overrides: tuple[str, ...], seed: int, dtype: str | None, device: str = "cpu") -> Model:
    from zoo.checkpoints.hub import local_folder
    from zoo.checkpoints.own import configure, load, stored_dtype
    from zoo.config import parse_overrides
    from zoo.factory import create

    folder, fields = local_folder(name, "RUN_OR_NAME"), parse_overrides(overrides)
    if not folder.is_dir():
        return create(name, seed=seed, dtype=dtype or "float32", device=device, **fields)
    if device == "meta":
        return create(configure(folder, fields), device=device, dtype=dtype or stored_dtype(folder))
    return load(folder, dtype=dtype, **fields)

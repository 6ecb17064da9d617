"""The `zoo-export` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import CONTEXT, one_line_errors

if TYPE_CHECKING:
    from zoo.model import Model


@click.command(context_settings=CONTEXT)
@click.argument("model", metavar="RUN_OR_NAME")
@click.argument("overrides", metavar="[FIELD=VALUE]...", nargs=-1)
@click.option("--target", default="onnx", show_default=True, help="What to write.")
@click.option("--out", type=click.Path(path_type=Path), help="New folder for the bundle.")
@click.option(
    "--verify-only", type=click.Path(path_type=Path), metavar="DIR", help="Write nothing; compare the bundle in DIR with the model."
)
@click.option("--compute-capability", metavar="LIST", help="tensorrt: GPUs to build for that are not here, such as 8.0,12.0.")
@click.option("--batch", type=int, nargs=3, metavar="MIN OPT MAX", help="tensorrt: streams that run together.  [default: 1 1 8]")
@click.option("--workspace", type=float, metavar="GIB", help="tensorrt: memory that a layer may use for itself.  [default: 4]")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="tensorrt: file that makes the next build quicker.")
@click.option("--seed", default=0, show_default=True, help="Of the random weights, where the model is a name.")
def main(
    model: str,
    overrides: tuple[str, ...],
    target: str,
    out: Path | None,
    verify_only: Path | None,
    seed: int,
    compute_capability: str | None,
    **options: Any,
) -> None:
    """Write a model that sleeps as graphs that need no PyTorch modules, and run them against PyTorch.

    RUN_OR_NAME is a folder with zoo.yaml and model.safetensors, or the name of a model (random weights).
    FIELD=VALUE replaces a field of its config, for example loops=4.
    """
    if (out is None) == (verify_only is None):
        raise click.UsageError("want either --out DIR or --verify-only DIR")
    options["compute_capability"] = compute_capability and compute_capability.split(",")
    options = {name: value for name, value in options.items() if value is not None}
    with one_line_errors():
        if out is not None:
            _write(model, overrides, seed, target, out, options)
        elif verify_only is not None:
            _compare(model, overrides, seed, verify_only)


def _write(name: str, overrides: tuple[str, ...], seed: int, target: str, out: Path, options: dict[str, Any]) -> None:
    from rich.console import Console

    from zoo.config import validate
    from zoo.export.bundle import export
    from zoo.export.manifest import Bundle
    from zoo.export.target import targets
    from zoo.files import refuse_existing

    validate(targets.get(target), options, f"target {target}").check("float32", 0)
    refuse_existing(out)
    console = Console()
    console.print(export(_model(name, overrides, seed), out, target=target, **options).table())
    for file in sorted(out.iterdir()):
        console.print(f"{file}  {file.stat().st_size:,} bytes", highlight=False)
    for engine, spec in Bundle.read(out).engines.items():
        console.print(f"{engine}: {spec}", highlight=False, soft_wrap=True)


def _compare(name: str, overrides: tuple[str, ...], seed: int, folder: Path) -> None:
    from rich.console import Console

    from zoo.export.runtime import ExportedModel
    from zoo.export.verify import verify

    exported = ExportedModel(folder)
    Console().print(verify(_model(name, overrides, seed), exported).table())


def _model(name: str, overrides: tuple[str, ...], seed: int) -> Model:
    import torch

    from zoo.config import parse_overrides
    from zoo.kernels.registry import ZooError
    from zoo.weights import create, load

    fields = parse_overrides(overrides)
    if not Path(name).is_dir():
        return create(name, seed=seed, **fields)
    stored = load(name, dtype=torch.float32)
    model = create(stored.config, device="meta", **fields)
    try:
        model.load_state_dict(stored.state_dict(), assign=True)
    except RuntimeError:
        raise ZooError(f"{name}: its weights do not fit {' '.join(overrides)}") from None
    return model

"""Types and options of the command line that several commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

import click

from zoo.errors import ZooError
from zoo.files import as_path
from zoo.schedule import LONGEST_WAIT


class Number(click.FloatRange):
    """A number within bounds; NaN is always out of bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is not a number.", param, ctx) if number != number else number


class FilePath(click.Path):
    """A path that a system can have."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return as_path(super().convert(value, param, ctx), "path")
        except ZooError as error:
            return self.fail(str(error), param, ctx)


PATH = FilePath()
SECONDS = Number(0, LONGEST_WAIT)
DEVICE = click.option("--device", default="cpu", show_default=True, help="Device to run on, such as cuda or cuda:1.")
DTYPE = click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Weights and activations.  [default: as stored]"
)


COMPILE = click.option("--compile", is_flag=True, help="Compile the model's blocks for decoding on a CPU, in the background.")


def _use_threads(ctx: click.Context, param: click.Parameter, threads: int | None) -> None:
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)  # PyTorch reads them when it is imported
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(threads)


THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    expose_value=False,
    callback=_use_threads,
    help="CPU threads of PyTorch and of exported graphs.  [default: one per core]",
)


def _part(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    part = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        raise click.BadParameter(f"{value!r}; want K/N with K from 1 to N, such as 2/4", ctx, param)
    return int(part[1]), int(part[2])


SHARD = click.option("--shard", default="1/1", callback=_part, metavar="K/N", help="Train only the K-th of N parts of the runs.")


def refuse_twice(field: str, value: Any, overrides: Iterable[str]) -> None:
    """Raise a ZooError if a field of the config has a value by its option and by FIELD=VALUE."""
    if value is not None and (pair := next((pair for pair in overrides if pair.startswith(f"{field}=")), None)):
        raise ZooError(f"--{field}: {value}; {pair} sets it too; want one of them")

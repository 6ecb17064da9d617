"""Commands that list, describe, convert and publish models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from zoo.cli.group import main
from zoo.config import parse_overrides
from zoo.errors import ZooError
from zoo.facets import list_models
from zoo.files import as_path
from zoo.options import PATH
from zoo.registry import listed, nearest

if TYPE_CHECKING:
    from zoo.costs import Description


@main.command("list")
@click.argument("wildcard", default="*")
@click.option("--sleeps", is_flag=True, help="Only models with fast weights, into which a sleep consolidates.")
@click.option("--family", metavar="TYPE", help="Only models of this checkpoint family, the model_type in config.json, such as bamba.")
@click.option("--params", metavar="RANGE", help="Only models with this number of parameters, such as 1b..3b, 3b.. or ..500m.")
@click.option("--mixer", metavar="KIND", help="Only models with a layer of this kind, such as mamba2.")
def list_(wildcard: str, sleeps: bool, family: str | None, params: str | None, mixer: str | None) -> None:
    """List the models whose names match WILDCARD, such as 'jet*', and that match every option.

    Suffixes may be added to a name, in this order: -sleep<N> for N passes per sleep, then -hard<L>, -slide<L> or -full for what
    happens to the window cache when a window of L tokens is full.
    """
    names = list_models(wildcard, sleeps=sleeps, family=family, params=params, mixer=mixer)
    if not names and (named := list_models(wildcard)):
        raise ZooError(f"no model matches '{wildcard}' with these options; without them: {listed(named)}")
    if not names:
        raise ZooError(f"no model matches '{wildcard}'; {nearest(wildcard.strip('*?'), list_models())}; see `zoo list`")
    click.echo("\n".join(names))


@main.command()
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the config as YAML, which every command accepts as MODEL.")
def describe(model: str, overrides: tuple[str, ...], as_yaml: bool) -> None:
    """Show the size and costs of a model.

    MODEL is a name, a YAML file, or a folder: a saved model, a training run or an upstream checkpoint. No weights are read.
    FIELD=VALUE replaces a field of its config, such as d_model=128.
    """
    fields = parse_overrides(overrides)
    if as_yaml and not as_path(model, "MODEL").is_dir():
        from zoo.config import resolve

        click.echo(resolve(model, fields).yaml(), nl=False)
        return
    description = _describe(model, fields)
    click.echo(description.config.yaml() if as_yaml else description, nl=not as_yaml)


def _describe(model: str, fields: dict[str, Any]) -> Description:
    from zoo.costs import describe as describe_model

    folder = as_path(model, "MODEL")
    if not folder.is_dir():
        return describe_model(model, **fields)
    import torch

    from zoo.checkpoints.own import CONFIG, configure, stored_dtype
    from zoo.factory import create
    from zoo.training.config import read_config as read_run
    from zoo.training.prepare import prepare
    from zoo.training.run_folder import SETTINGS

    if (folder / SETTINGS).is_file() and not (folder / CONFIG).is_file():  # a run that has not finished
        started = prepare(read_run(folder), torch.device("meta")).model
        return describe_model(create(started.config, device="meta", dtype=started.embed.weight.dtype, **fields))
    return describe_model(create(configure(folder, fields), device="meta", dtype=stored_dtype(folder)))


@main.command()
@click.argument("source")
@click.argument("destination", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--to", "form", type=click.Choice(["zoo", "hf"]), default="zoo", show_default=True, help="Format of the copy.")
def convert(source: str, destination: Path, overrides: tuple[str, ...], form: Literal["zoo", "hf"]) -> None:
    """Convert a checkpoint to another format, or give it sleep settings.

    SOURCE is a folder of this package or of an upstream project, or hf://OWNER/NAME[@REVISION], which is downloaded from the
    Hugging Face hub; DESTINATION is a new folder. Tensors are copied bit for bit, with the tokenizer and other files; `--to hf`
    writes the config.json and the tensor names of the upstream project.
    FIELD=VALUE replaces a field of the config: loops=4 evict=hard window=512 makes the copy sleep.
    """
    from zoo.checkpoints.own import load, save
    from zoo.console import spinner
    from zoo.files import refuse_existing

    refuse_existing(destination)
    with spinner(f"converting {source}"):
        model = load(source, **parse_overrides(overrides))
        save(model, destination, format=form)
    click.echo(f"{model.config.name}: {source} -> {destination}")


@main.command()
@click.argument("folder", type=PATH)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--revision", metavar="BRANCH", help="Branch of the repository.  [default: the main branch]")
@click.option("--public", is_flag=True, help="Make a new repository public.")
def push(folder: Path, repository: str, revision: str | None, public: bool) -> None:
    """Publish a model on the Hugging Face hub.

    FOLDER is a saved model, an upstream checkpoint, a training run or one of its checkpoints. A new repository is private. The
    token is that of `hf auth login` or of HF_TOKEN.
    """
    from zoo.console import spinner
    from zoo.publish import push as run

    with spinner(f"uploading {folder}"):
        address = run(folder, repository, revision=revision, public=public)
    click.echo(f"published as {address}")

"""The `zoo` command. torch is imported by the commands that need it, not by `--help` or `zoo list`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from zoo.config import list_models, parse_overrides
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.model import Model
    from zoo.text.tokenizers import ByteTokenizer

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input is answered with one line and exit status 2."""
    try:
        yield
    except ZooError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


class Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="sleep-zoo")
def main() -> None:
    """A model zoo for language models that sleep."""


@main.command("list")
@click.argument("wildcard", default="*")
def list_(wildcard: str) -> None:
    """Names of models that match WILDCARD, such as 'jet*'.

    To each name these suffixes may be added: -sleep<N> for N passes of sleep, then -hard<L>, -slide<L> or -full for what
    happens when a window of L tokens is full.
    """
    names = list_models(wildcard)
    if not names:
        raise ZooError(f"no model matches '{wildcard}'; there are: {', '.join(list_models())}")
    click.echo("\n".join(names))


@main.command()
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the whole config as YAML, which every command takes as MODEL.")
def describe(model: str, overrides: tuple[str, ...], as_yaml: bool) -> None:
    """Size and costs of MODEL: a name, or a YAML file."""
    if as_yaml:
        from zoo.config import resolve

        click.echo(resolve(model, parse_overrides(overrides)).yaml(), nl=False)
    else:
        from zoo.costs import describe as describe_model

        click.echo(describe_model(model, **parse_overrides(overrides)))


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<name of CONFIG>]")
@click.option("--wandb", metavar="PROJECT", help="Send metrics to Weights & Biases too.")
def train(config: str, overrides: tuple[str, ...], out: Path | None, wandb: str | None) -> None:
    """Train as CONFIG says: a YAML file, or the name of a shipped one, for example `cycle steps=100 task.hops=2`.

    A run that was interrupted goes on from its newest checkpoint when the command is given again, or as `zoo train RUN` with
    its folder. SIGTERM writes a checkpoint first. A folder that holds anything else is refused. Metrics go to RUN/metrics.jsonl
    and, where TensorBoard is installed, to RUN/tensorboard.

    On several GPUs or machines: `torchrun --nproc-per-node 8 -m zoo train CONFIG`; see docs/training.md.
    """
    from zoo.training.loop import StoppedError, read_config
    from zoo.training.loop import train as run
    from zoo.training.parallel import is_first
    from zoo.training.progress import training_bar
    from zoo.training.reporting import tensorboard, weights_and_biases

    plan = read_config(config, parse_overrides(overrides))
    if out is None:
        out = Path(config) if Path(config, "train.yaml").is_file() else Path("runs") / Path(config).stem
    try:
        with training_bar(plan.steps, plan.model) as bar, tensorboard(out) as board, weights_and_biases(wandb, out, plan) as biases:

            def report(metrics: dict[str, Any]) -> None:
                for watcher in (bar, board, biases):
                    watcher(metrics)

            results = run(plan, out, report=report)
    except StoppedError as stopped:
        if is_first():
            click.echo(str(stopped), err=True)
        return
    if is_first():
        _show(results)
        click.echo(f"written to {out}")


@main.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--sequences", type=click.IntRange(min=1), default=2048, show_default=True, help="Held-out sequences.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--loops", type=click.IntRange(min=1), help="Passes per sleep, if not as trained.")
def eval_(run: Path, sequences: int, seed: int, loops: int | None) -> None:
    """Evaluate the folder RUN of a training run on held-out sequences of its task."""
    from zoo.checkpoints.own import load
    from zoo.tasks import new_task
    from zoo.training.loop import evaluate, read_config

    plan = read_config(run / "train.yaml")
    model = load(run)
    _show(evaluate(model, new_task(plan.task), sequences, seed=seed, loops=loops))


@main.command()
@click.argument("plan")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the ablation.")
@click.option("--processes", type=click.IntRange(min=1), help="Runs at once.  [default: one for each GPU, else for each core]")
def ablate(plan: str, overrides: tuple[str, ...], out: Path, processes: int | None) -> None:
    """Compare the arms that PLAN names, a YAML file or a shipped one, for example `cycle-small base.steps=100 seeds=[0]`.

    Every arm is trained at every seed; runs.csv, table.md and plots say what came of it. The same command goes on with what an
    interrupted one has left.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from zoo.training.ablation import ablate as run
    from zoo.training.ablation import read_plan
    from zoo.training.loop import StoppedError

    try:
        table = run(read_plan(plan, parse_overrides(overrides)), out, processes=processes)
    except StoppedError as stopped:
        click.echo(str(stopped), err=True)
        return
    Console().print(Markdown(table))
    click.echo(f"written to {out}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New picture: .png, .svg or .pdf.")
def plot(runs: tuple[Path, ...], out: Path) -> None:
    """Draw the training runs in the folders RUN: loss and accuracy over tokens, and accuracy against N where N differs.

    Runs that differ in the seed alone share a colour.
    """
    from zoo.training.plots import figure, grouped, read_run, refuse, save

    refuse(out)
    save(figure(grouped(read_run(folder) for folder in runs)), out)
    click.echo(f"written to {out}")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["zoo", "hf"]), default="zoo", show_default=True, help="Names and config of the copy.")
def convert(source: Path, destination: Path, form: Literal["zoo", "hf"]) -> None:
    """Copy the model in the folder SOURCE, of this package or of an upstream project, to the new folder DESTINATION.

    The tensors stay as they are, bit for bit; `--to hf` writes config.json and the names of the upstream project.
    """
    from zoo.checkpoints.own import load, save
    from zoo.files import refuse_existing

    refuse_existing(destination)
    model = load(source)
    save(model, destination, format=form)
    click.echo(f"{model.config.name}: {source} -> {destination}")


@main.command()
@click.option("--check/--no-check", default=True, help="Run every form against the step recurrence: a minute at most.")
def doctor(check: bool) -> None:
    """What serves each operator on this machine, and whether it computes what it should.

    On a GPU the verdict on each shipped configuration is kept: configurations that are not proven are not used.
    """
    from zoo.doctor import run

    if not run(check):
        sys.exit(1)


@main.command()
@click.argument("model")
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: the likeliest token.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="The same answers every time.")
@click.option("--loops", type=click.IntRange(min=1), help="Passes per sleep between turns, if not as the model has.")
def chat(model: str, tokens: int, temperature: float, top_p: float, seed: int | None, loops: int | None) -> None:
    """Talk with MODEL, a folder or a name; it sleeps between turns. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from zoo.serving.chat import converse
    from zoo.sessions.session import Session

    opened, text = _open(model)
    converse(Session(opened), text, tokens, loops=loops, temperature=temperature, top_p=top_p, seed=seed)


@main.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; this one is seen from this machine alone.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True, help="Streams whose tokens are one batch.")
@click.option("--sessions", type=click.IntRange(min=1), default=64, show_default=True, help="Streams at once; one more is refused.")
@click.option("--idle", type=click.FloatRange(min=0), default=3600.0, show_default=True, help="Seconds that an unused session is kept.")
@click.option("--when", default="full", show_default=True, help="When streams sleep: full, 'interval(512)', 'idle(0.5)'.")
@click.option(
    "--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens per stream of a model that never sleeps."
)
@click.option("--max-prompt", type=click.IntRange(min=1), default=32768, show_default=True, help="Tokens of a prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of an answer.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Memory of all streams: refuses to start with sessions that may need more.")
@click.option("--max-body", type=click.IntRange(min=1), default=2**20, show_default=True, help="Bytes of a request.")
def serve(
    model: str,
    host: str,
    port: int,
    slots: int,
    sessions: int,
    idle: float,
    when: str,
    context: int,
    max_prompt: int,
    max_tokens: int,
    max_bytes: int | None,
    max_body: int,
) -> None:
    """Serve MODEL, a folder or a name, on the routes of OpenAI's completions and chat.

    A request with "session": "some-id" in its body goes on where the last one with this id ended.
    """
    from zoo.serving.app import Limits, make_app  # says what to install

    import uvicorn  # isort: skip
    from zoo.sessions.pool import SessionPool

    opened, text = _open(model)
    pool = SessionPool(opened, slots, streams=sessions, when=when, context=context, max_bytes=max_bytes)
    limits = Limits(body=max_body, prompt=max_prompt, tokens=max_tokens, idle=idle)
    uvicorn.run(make_app(pool, text, opened.config.name, limits), host=host, port=port, access_log=False, timeout_graceful_shutdown=5)


def _open(model: str) -> tuple[Model, ByteTokenizer]:
    """The model in a folder, or of a name or a YAML file with fresh weights; and its tokenizer."""
    from zoo.checkpoints.own import load
    from zoo.factory import create
    from zoo.text.tokenizers import load_tokenizer

    folder = Path(model) if Path(model).is_dir() else None
    opened = create(model) if folder is None else load(folder)
    text = load_tokenizer(folder, opened.config.vocab_size)
    if folder is None:
        click.echo(f"{model}: fresh weights; give a folder for trained ones", err=True)
    return opened, text


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="New folder for the results.")
def demo(out: Path) -> None:
    """Train one small model at N = 1, 2 and 4, export it, and compare: about eight minutes on two cores."""
    from zoo.demo import run

    run(out)


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['model']} on {results['task']}: {results['answers']} held-out answers")
    table.add_column(results["level_name"])
    table.add_column("right", justify="right")
    for level, share in results["by_level"].items():
        table.add_row(str(level), f"{share:.1%}")
    table.add_section()
    table.add_row("all answers", f"{results['accuracy']:.1%}")
    table.add_row("best guess without the context", f"{results['chance']:.1%}")
    table.add_row("whole sequences", f"{results['exact']:.1%}")
    if results["exact_chance"] is not None:
        table.add_row("whole sequences, best guess", f"{results['exact_chance']:.2%}")
    Console().print(table)

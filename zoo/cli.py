"""The `zoo` command. torch is imported by the commands that need it, not by `--help` or `zoo list`."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from zoo.config import parse_overrides
from zoo.errors import ZooError, counted
from zoo.facets import list_models
from zoo.files import as_path
from zoo.options import DEVICE, DTYPE, PATH, SHARD, THREADS, Number
from zoo.registry import listed, nearest
from zoo.signals import StoppedError, interruptible

if TYPE_CHECKING:
    from zoo.costs import Description
    from zoo.text.tokenizers import ByteTokenizer

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
SECTIONS = {
    "Models": ("list", "describe", "convert", "push"),
    "Training": ("tokenize", "train", "eval", "lm-eval", "ablate", "plot", "probe", "demo"),
    "Inference": ("chat", "serve"),
    "This machine": ("doctor",),
}


@contextmanager
def exit_status() -> Iterator[None]:
    """Report bad input in one line and exit with status 2. A command that a signal stopped exits with 128 + its number.

    Warnings take one line, too.
    """
    warnings.formatwarning = lambda message, *place: f"Warning: {message}\n"
    try:
        yield
    except ZooError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except StoppedError as stopped:
        from zoo.training.parallel import is_main_process

        if is_main_process():
            click.echo(str(stopped), err=True)
        sys.exit(stopped.status)


class Source(click.Path):
    """A path that exists, or the address of a dataset."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).startswith("hf://"):
            return super().convert(value, param, ctx)
        if not str(value).startswith("hf://datasets/"):
            self.fail(f"'{value}': want hf://datasets/OWNER/NAME, or a path", param, ctx)
        return value


class Group(click.Group):
    """Group that lists its commands in sections and prints one-line errors."""

    def invoke(self, ctx: click.Context) -> Any:
        with exit_status():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(80)) for name in names])


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="sleep-zoo")
def main() -> None:
    """A model zoo of language models that sleep."""


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


@main.command()
@click.argument("corpus", nargs=-1, required=True, type=Source(exists=True, path_type=Path), metavar="CORPUS...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder for the tokens.")
@click.option(
    "--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with a tokenizer.  [default: bytes]"
)
@click.option("--field", default="text", show_default=True, help="Field of a row that holds the text.")
@click.option("--split", default="train", show_default=True, help="Split of datasets that is read.")
@click.option("--held-out", type=Number(0, 1), default=0.01, show_default=True, help="Fraction of documents held out in test.npy.")
def tokenize(corpus: tuple[Path | str, ...], out: Path, tokenizer: Path | None, field: str, split: str, held_out: float) -> None:
    """Turn text into tokens for the task `text`.

    CORPUS is a text file, which is one document, a .jsonl or .parquet file with a document in each row, a folder of these, or
    hf://datasets/OWNER/NAME, a dataset of the Hugging Face hub. Writes train.npy, test.npy and data.yaml, and a copy of the
    tokenizer. An EOS token follows every document.
    """
    from zoo.text.corpus import tokenize as run

    made = run(corpus, out, tokenizer=tokenizer, field=field, split=split, held_out=held_out)
    click.echo(
        f"{counted(made.documents, 'document')}, {counted(made.train, 'token')} to train on, {made.test} held out; vocabulary: {made.vocab}"
    )
    click.echo(f"written to {out}")


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", type=PATH, help="Folder for the run.  [default: runs/<name of CONFIG>]")
@click.option(
    "--track",
    multiple=True,
    metavar="NAME",
    help="Also send metrics to this tracker: wandb, one of accelerate's, or a class as package.module:Class.",
)
@click.option("--wandb", metavar="PROJECT", help="As --track wandb, with the project.")
@THREADS
def train(config: str, overrides: tuple[str, ...], out: Path | None, track: tuple[str, ...], wandb: str | None) -> None:
    """Train a model, or resume a run.

    CONFIG is a YAML file or the name of a shipped config, for example `zoo train cycle steps=100 task.hops=2`.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save a checkpoint before the process exits. To resume, repeat the command, or give the
    folder of the run as CONFIG; `zoo train RUN steps=2000` extends a finished run. Metrics are written to metrics.jsonl and, if
    TensorBoard is installed, tensorboard/.

    On several GPUs or machines: `torchrun --nproc-per-node 8 -m zoo train CONFIG`; see docs/training.md.
    """
    from zoo.console import print_results
    from zoo.training.config import read_config
    from zoo.training.loop import train as run
    from zoo.training.parallel import is_main_process
    from zoo.training.reporting import all_sinks
    from zoo.training.trackers import WeightsAndBiases, new_tracker

    plan = read_config(config, parse_overrides(overrides))
    if out is None:
        out = Path(config) if Path(config, "train.yaml").is_file() else Path("runs") / Path(config).stem
    trackers = [*map(new_tracker, track), *([] if wandb is None else [WeightsAndBiases(wandb)])]
    with all_sinks(plan, out, trackers) as report:
        results = run(plan, out, report=report, measure_products=True)
    if is_main_process():
        print_results(results)
        click.echo(f"written to {out}")


@main.command("eval")
@click.argument("folder", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Held-out text, tokens or questions.  [default: as in the run]")
@click.option("--length", type=click.IntRange(min=2), help="Tokens per sequence of --data.  [default: as in the run, else four windows]")
@click.option("--sequences", type=click.IntRange(min=1), help="Maximum number of held-out sequences.  [default: as in the run, else 2048]")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the sequences of the run's task.  [default: as in the run]")
@click.option("--loops", type=click.IntRange(min=1), help="Passes per sleep.  [default: as trained]")
@click.option("--compare", is_flag=True, help="Compare with the parent and without sleep, in one table.")
@click.option("--parent", type=PATH, help="Folder of the parent for --compare.  [default: the run's initial weights, else its own]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@DEVICE
@DTYPE
@THREADS
def eval_(folder: Path, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Evaluate a model on held-out sequences.

    FOLDER is a training run, finished or not, one of its checkpoints, or the folder of a model, which needs --data: a text file, a
    .jsonl or .parquet file of documents, a .npy file of tokens, or a .jsonl file of questions or of conversations as the tasks qa and
    chat read them. FIELD=VALUE replaces a field of the model's config, such as evict=sliding.
    """
    from zoo.console import print_comparison, print_results
    from zoo.training.evaluate_folder import evaluate_folder

    results = evaluate_folder(folder, parse_overrides(overrides), **options)
    if as_json:
        import json

        click.echo(json.dumps(results, indent=2))
    elif options["compare"]:
        print_comparison(results)
    else:
        print_results(results)


@main.command("lm-eval", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="ARGUMENTS...")
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Evaluate a model on the tasks of lm-evaluation-harness.

    ARGUMENTS are those of its own command `lm-eval`, for example:
    `zoo lm-eval run --model zoo --model_args pretrained=FOLDER,loops=4 --tasks arc_easy`. `zoo lm-eval run --help` lists them.

    --model_args takes pretrained, the folder of a model or a training run; loops, when, sleep_before_answer=True, dtype, and fields of
    the model's config.
    """
    from zoo.integrations.lm_eval import run  # raises a ZooError that names what to install

    run(arguments)


@main.command()
@click.argument("plan")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", type=PATH, required=True, help="Folder for the ablation.")
@click.option("--processes", type=click.IntRange(min=1), help="Number of concurrent runs.  [default: one per GPU, else one per core]")
@SHARD
@click.option("--on", type=click.Choice(["ray"]), help="Cluster to train on: that of RAY_ADDRESS, else a Ray of this machine.")
def ablate(plan: str, overrides: tuple[str, ...], out: Path, processes: int | None, shard: tuple[int, int], on: str | None) -> None:
    """Train and compare variants of a model.

    PLAN names the arms: a YAML file, or a shipped plan, for example `zoo ablate cycle-small base.steps=100 seeds=[0] --out FOLDER`.

    Every arm is trained with every seed, by default for the tokens and for the training FLOPs of the first arm (match=[tokens] and
    match=[flops] choose). Results: runs.csv, table.md and plots. Ctrl-C and the other signals of `zoo train` stop it; to resume,
    repeat the command.

    Several of these commands, on one or several machines, may share a folder: each trains runs that no other is training.
    """
    from zoo.console import print_markdown
    from zoo.training.ablation import ablate as run
    from zoo.training.plan import read_plan

    options: dict[str, Any] = {"processes": processes, "shard": shard}
    if on == "ray":
        from zoo.integrations.ray import train_all  # raises a ZooError that names what to install

        options["on"] = train_all
    table = run(read_plan(plan, parse_overrides(overrides)), out, **options)
    print_markdown(table)
    click.echo(f"written to {out}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--out", type=PATH, required=True, help="Image file to write: .png, .svg or .pdf.")
def plot(runs: tuple[Path, ...], out: Path) -> None:
    """Plot training runs.

    Each RUN is a folder. Shows loss and accuracy against tokens, and accuracy against N. Runs that differ only in the seed share a colour.
    """
    from zoo.training.plots import figure, grouped, read_run, refuse, save

    refuse(out)
    save(figure(grouped(read_run(folder) for folder in runs)), out)
    click.echo(f"written to {out}")


@main.command("probe")
@click.argument("named", metavar="RUN_OR_NAME")
@click.option("--loops", type=click.IntRange(min=1), help="Passes per sleep.  [default: as trained]")
@click.option("--cycles", type=click.IntRange(min=1), default=6144, show_default=True, help="Held-out cycles to fit the read-outs on.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the cycles and of the untrained model.")
@click.option("--out", type=PATH, help="New folder for the results.  [default: probe/<name of RUN>]")
@THREADS
def probe_(named: str, loops: int | None, cycles: int, seed: int, out: Path | None) -> None:
    """Show what a sleep writes, pass by pass.

    RUN_OR_NAME is the folder of a run of the task cycle, or cycle2-sleep1 or cycle2-sleep4, whose weights come with the package.

    Prints which hops can be read linearly from the fast weights S after each pass, beside the untrained model and shuffled labels, and
    the norms of h, S and gradients. Writes them as probe.json and probe.csv, and draws probe.png, which also shows how S changes.
    """
    from zoo.console import print_probe, spinner
    from zoo.files import refuse_existing
    from zoo.training.probe import open_model, probe, write

    out = out or Path("probe") / Path(named).name
    refuse_existing(out)
    model, task = open_model(named)
    with spinner(f"probing {named}"):
        results = probe(model, task, loops=loops, cycles=cycles, seed=seed)
        write(results, out)
    print_probe(results)
    click.echo(f"written to {out}")


@main.command()
@click.option("--out", type=PATH, default=Path("demo"), show_default=True, help="Folder for the results.")
@THREADS
def demo(out: Path) -> None:
    """Train and compare a small model at N = 1, 2, 4. Exports each model too; takes about eight minutes on two cores.

    Ctrl-C stops it; to continue, repeat the command.
    """
    from zoo.demo import run

    run(out)


@main.command()
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Maximum number of tokens in an answer.")
@click.option("--temperature", type=Number(min=0), default=0.8, show_default=True, help="0 always picks the most likely token.")
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Sample from the smallest set of tokens with this total probability.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed for reproducible answers.")
@click.option("--loops", type=click.IntRange(min=1), help="Passes per sleep between turns.  [default: as in the model]")
@DEVICE
@DTYPE
@THREADS
def chat(
    model: str,
    overrides: tuple[str, ...],
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    loops: int | None,
    device: str,
    dtype: str | None,
) -> None:
    """Chat with a model that sleeps between turns.

    MODEL is the folder of a model or of an exported bundle, hf://OWNER/NAME[@REVISION], or a name. FIELD=VALUE replaces a field of
    its config, such as window=512. Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    from zoo.products import fast_decoding
    from zoo.serving.chat import converse
    from zoo.sessions.session import Session

    opened, tokenizer = _open(model, overrides, device, dtype)
    with interruptible(), fast_decoding(opened):
        converse(Session(opened), tokenizer, tokens, loops=loops, temperature=temperature, top_p=top_p, seed=seed)


@main.command()
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; the default is only reachable locally.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0 picks a free one.")
@click.option("--slots", type=click.IntRange(min=1), help="Maximum number of streams in a batch.  [default: 8, at most --sessions]")
@click.option("--sessions", type=click.IntRange(min=1), default=64, show_default=True, help="Maximum number of open streams.")
@click.option("--idle", type=Number(min=0), default=3600.0, show_default=True, help="Seconds to keep an unused session.")
@click.option("--when", default="full", show_default=True, help="When streams sleep: full, 'interval(512)' or 'idle(0.5)'.")
@click.option(
    "--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Maximum tokens per stream if the model never sleeps."
)
@click.option("--max-prompt", type=click.IntRange(min=1), default=32768, show_default=True, help="Maximum number of tokens in a prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Maximum number of tokens in an answer.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Memory limit for stream states; refuses settings that may exceed it.")
@click.option("--max-body", type=click.IntRange(min=1), default=2**20, show_default=True, help="Maximum size of a request, in bytes.")
@click.option("--connections", type=click.IntRange(min=1), default=1000, show_default=True, help="Maximum number of connections.")
@click.option(
    "--client-timeout",
    "patience",
    type=Number(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for a client to send a request, or to read a part of an answer.",
)
@click.option(
    "--queue", type=click.IntRange(min=0), default=64, show_default=True, help="Maximum number of requests that wait for a stream."
)
@click.option("--wait", type=Number(min=0), default=10.0, show_default=True, help="Seconds that a request may wait for a stream.")
@click.option(
    "--prefix-bytes",
    type=click.IntRange(min=0),
    default=2**28,
    show_default=True,
    help="Memory for cached states that prompts may continue from.",
)
@click.option("--api-key", "api_keys", multiple=True, envvar="ZOO_API_KEY", help="API key that requests must carry; may be repeated.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Name of the server besides localhost, or *; may be repeated.")
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="Web pages that may use the server, such as https://example.com, or *; may be repeated.",
)
@click.option(
    "--store",
    type=click.Path(file_okay=False),
    metavar="DIRECTORY|URL",
    help="Folder, or prefix in an object store such as s3://BUCKET/PREFIX, that keeps sessions across restarts.",
)
@click.option("--page/--no-page", default=True, show_default=True, help="Serve a page for a browser at /.")
@click.option("--name", help="Name of the model in requests.  [default: its own]")
@click.option("--grace", type=Number(min=0), default=30.0, show_default=True, help="Seconds to finish answers after SIGTERM or Ctrl-C.")
@DEVICE
@DTYPE
@THREADS
def serve(
    model: str,
    overrides: tuple[str, ...],
    host: str,
    port: int,
    slots: int | None,
    sessions: int,
    idle: float,
    when: str,
    context: int,
    max_prompt: int,
    max_tokens: int,
    max_bytes: int | None,
    max_body: int,
    connections: int,
    patience: float,
    queue: int,
    wait: float,
    prefix_bytes: int,
    api_keys: tuple[str, ...],
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    store: str | None,
    page: bool,
    name: str | None,
    grace: float,
    device: str,
    dtype: str | None,
) -> None:
    """Serve a model over HTTP.

    MODEL is the folder of a model or of an exported bundle, hf://OWNER/NAME[@REVISION], or a name. FIELD=VALUE replaces a field of
    its config, such as window=512. The endpoints are OpenAI-compatible. Requests with the same "session": "some-id" continue one stream.
    On SIGTERM or Ctrl-C, requests in progress are answered and new ones refused.
    """
    from zoo.products import fast_decoding
    from zoo.serving.app import make_app  # raises a ZooError that names what to install
    from zoo.serving.draining import run
    from zoo.serving.limits import Limits
    from zoo.serving.listening import is_loopback, listen
    from zoo.sessions.pool import SessionPool

    limits = Limits(max_body, max_prompt, max_tokens, idle, prefix_bytes, connections, patience, queue, wait)
    with listen(host, port) as listener:  # requests wait while the model is loaded
        opened, tokenizer = _open(model, overrides, device, dtype)
        pool = SessionPool(opened, slots, streams=sessions, when=when, context=context, max_bytes=max_bytes)
        of = name or opened.config.name
        app = make_app(pool, tokenizer, of, limits, keys=api_keys, store=store, hosts=hosts, origins=origins, page=page)
        if not api_keys and not is_loopback(host):
            click.echo(f"host {host}: without --api-key, everyone who can reach this address may use the server", err=True)
        with fast_decoding(opened):
            run(app, listener, grace)


@main.command()
@click.option("--check/--no-check", default=True, help="Check every form of every operator; takes a minute at most.")
@click.option("--device", help="Device to check, such as cuda:1.  [default: cuda if available, else cpu]")
@THREADS
def doctor(check: bool, device: str | None) -> None:
    """Check the operators on this machine.

    Shows which form of each operator is used, and compares every form with the reference. On a GPU the results are stored:
    only kernel configurations that passed are used.
    """
    from zoo.doctor import run

    if not run(check, device):
        sys.exit(1)


def _open(model: str, overrides: tuple[str, ...], device: str, dtype: str | None) -> tuple[Any, ByteTokenizer]:
    """Return a model and its tokenizer: the contents of a folder, or fresh weights for a name or a YAML file."""
    from zoo.checkpoints.hub import local_folder
    from zoo.checkpoints.own import load
    from zoo.console import spinner
    from zoo.devices import usable_device
    from zoo.factory import create
    from zoo.text.tokenizers import load_tokenizer

    folder, fields = path if (path := local_folder(model, "MODEL")).is_dir() else None, parse_overrides(overrides)
    opened: Any
    with spinner(f"loading {model}" if folder else f"creating {model}"):
        if folder is not None and (folder / "bundle.json").is_file():
            opened = _open_bundle(folder, overrides, device, dtype)
        elif folder is not None:
            opened = load(folder, device=usable_device(device, meta=False), dtype=dtype, **fields)
        else:
            opened = create(model, device=usable_device(device, meta=False), dtype=dtype or "float32", **fields)
    tokenizer = load_tokenizer(folder, opened.config.vocab_size)
    if folder is None:
        click.echo(f"{model}: random weights; give a folder for trained ones", err=True)
    return opened, tokenizer


def _open_bundle(folder: Path, overrides: tuple[str, ...], device: str, dtype: str | None) -> Any:
    from zoo.export.runtime import ExportedModel

    if overrides or dtype is not None:
        raise ZooError(f"{folder}: {' '.join(overrides) or f'dtype {dtype}'}: an exported bundle is fixed; export it again")
    return ExportedModel(folder, device)

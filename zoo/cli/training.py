"""Commands that prepare data, train, evaluate and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli.group import main
from zoo.config import parse_overrides
from zoo.errors import counted
from zoo.options import DEVICE, DTYPE, PATH, SHARD, THREADS, Number, refuse_twice


class Source(click.Path):
    """A path that exists, or the address of a dataset."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).startswith("hf://"):
            return super().convert(value, param, ctx)
        if not str(value).startswith("hf://datasets/"):
            self.fail(f"'{value}': want hf://datasets/OWNER/NAME, or a path", param, ctx)
        return value


@main.command()
@click.argument("corpus", nargs=-1, required=True, type=Source(exists=True, path_type=Path), metavar="CORPUS...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder for the tokens.")
@click.option(
    "--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder with a tokenizer.  [default: bytes]"
)
@click.option("--field", default="text", show_default=True, help="Field of a row that holds the text.")
@click.option("--split", default="train", show_default=True, help="Split of datasets that is read.")
@click.option(
    "--held-out",
    type=Number(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Fraction of documents held out in test.npy.",
)
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
@click.argument("folder")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Held-out text, tokens or questions.  [default: as in the run]")
@click.option("--length", type=click.IntRange(min=2), help="Tokens per sequence of --data.  [default: as in the run, else four windows]")
@click.option("--sequences", type=click.IntRange(min=1), help="Maximum number of held-out sequences.  [default: as in the run, else 2048]")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the sequences of the run's task.  [default: as in the run]")
@click.option("--loops", type=click.IntRange(min=1), help="Passes per sleep.  [default: as trained]")
@click.option("--compare", is_flag=True, help="Compare with the parent and without sleep.")
@click.option("--parent", type=PATH, help="Folder of the parent for --compare.  [default: the run's initial weights, else its own]")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@DEVICE
@DTYPE
@THREADS
def eval_(folder: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Evaluate a model on held-out sequences.

    FOLDER is a training run, finished or not, one of its checkpoints, or the folder of a model, also hf://OWNER/NAME[@REVISION]. A model
    needs --data: a text file, a .jsonl or .parquet file of documents, a .npy file of tokens, or a .jsonl file of questions or of
    conversations as the tasks qa and chat read them. FIELD=VALUE replaces a field of the model's config, such as evict=sliding.
    """
    from zoo.checkpoints.hub import local_folder
    from zoo.console import print_comparison, print_results
    from zoo.training.evaluate_folder import evaluate_folder

    refuse_twice("loops", options["loops"], overrides)
    results = evaluate_folder(local_folder(folder, "FOLDER"), parse_overrides(overrides), **options)
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

    Every arm is trained with every seed, by default for the tokens and the training FLOPs of the reference arm (match=[tokens] and
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

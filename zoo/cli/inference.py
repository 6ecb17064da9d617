"""Commands that run a model, and the one that checks the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.group import main
from zoo.config import parse_overrides
from zoo.errors import ZooError
from zoo.options import COMPILE, DEVICE, DTYPE, SECONDS, THREADS, Number
from zoo.schedule import LONGEST_WAIT
from zoo.signals import interruptible

if TYPE_CHECKING:
    from zoo.text.tokenizers import ByteTokenizer


@main.command()
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Maximum number of tokens in an answer.")
@click.option("--temperature", type=Number(0, 1e30), default=0.8, show_default=True, help="0 always picks the most likely token.")
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Sample from the smallest set of tokens with this total probability.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed for reproducible answers.")
@click.option("--loops", type=click.IntRange(min=1), help="Passes per sleep between turns.  [default: as in the model]")
@COMPILE
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
    compile: bool,
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
    with interruptible(), fast_decoding(opened, compile=compile):
        converse(Session(opened, compile=compile), tokenizer, tokens, loops=loops, temperature=temperature, top_p=top_p, seed=seed)


@main.command()
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; the default is only reachable locally.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0 picks a free one.")
@click.option("--slots", type=click.IntRange(min=1), help="Maximum number of streams in a batch.  [default: 8, at most --sessions]")
@click.option("--sessions", type=click.IntRange(min=1), default=64, show_default=True, help="Maximum number of open streams.")
@click.option("--idle", type=SECONDS, default=3600.0, show_default=True, help="Seconds to keep an unused session.")
@click.option("--when", default="full", show_default=True, help="When streams sleep: full, 'interval(512)' or 'idle(0.5)'.")
@click.option(
    "--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Maximum tokens per stream if the model never sleeps."
)
@click.option(
    "--max-prompt", type=click.IntRange(min=1), default=32768, show_default=True, help="Maximum number of new tokens in a prompt."
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Maximum number of tokens in an answer.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Memory limit for stream states; refuses settings that may exceed it.")
@click.option("--max-body", type=click.IntRange(min=1), default=2**20, show_default=True, help="Maximum size of a request, in bytes.")
@click.option("--connections", type=click.IntRange(min=1), default=1000, show_default=True, help="Maximum number of connections.")
@click.option(
    "--client-timeout",
    "patience",
    type=Number(0, LONGEST_WAIT, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for a client to send a request, or to read a part of an answer.",
)
@click.option(
    "--queue", type=click.IntRange(min=0), default=64, show_default=True, help="Maximum number of requests that wait for a stream."
)
@click.option("--wait", type=SECONDS, default=10.0, show_default=True, help="Seconds that a request may wait for a stream.")
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
@click.option("--otlp", metavar="URL", help="OpenTelemetry collector for traces, such as http://localhost:4318/v1/traces.")
@click.option("--page/--no-page", default=True, show_default=True, help="Serve a page for a browser at /.")
@click.option("--name", help="Name of the model in requests.  [default: its own]")
@click.option("--grace", type=SECONDS, default=30.0, show_default=True, help="Seconds to finish answers after SIGTERM or Ctrl-C.")
@COMPILE
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
    otlp: str | None,
    page: bool,
    name: str | None,
    grace: float,
    compile: bool,
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
    from zoo.serving.store import places
    from zoo.sessions.pool import SessionPool
    from zoo.system import share_heaps

    share_heaps()
    if store is not None:
        places(store)  # refused before the model is loaded
    traces = None
    if otlp is not None:
        from zoo.serving.traces import Traces

        traces = Traces(otlp)
    limits = Limits(max_body, max_prompt, max_tokens, idle, prefix_bytes, connections, patience, queue, wait)
    with listen(host, port) as listener:  # requests wait while the model is loaded
        opened, tokenizer = _open(model, overrides, device, dtype)
        pool = SessionPool(opened, slots, streams=sessions, when=when, context=context, max_bytes=max_bytes, compile=compile)
        of = name or opened.config.name
        app = make_app(pool, tokenizer, of, limits, keys=api_keys, store=store, hosts=hosts, origins=origins, page=page, traces=traces)
        if not api_keys and not is_loopback(host):
            click.echo(f"host {host}: without --api-key, everyone who can reach this address may use the server", err=True)
        with fast_decoding(opened, compile=compile):
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

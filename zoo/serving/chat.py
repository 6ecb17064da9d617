"""A conversation in the terminal: the answer as it comes, and a sleep between turns."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from zoo.sessions.session import Session
from zoo.text.tokenizers import Bytes


def converse(
    session: Session,
    text: Bytes,
    tokens: int,
    *,
    loops: int | None = None,
    seed: int | None = None,
    console: Console | None = None,
    **sampling: Any,
) -> None:
    """Answer each line with at most `tokens` tokens, until the input ends. Sleeps in the background while the user writes.

    Args:
        loops: passes per sleep, if not as the model has.
        seed: of the first answer; each further one has the next.
        sampling: as `Session.generate` takes it.
    """
    console = console or Console()
    for turn in itertools.count(seed or 0):
        console.print(_status(session), justify="right")
        try:
            while not (line := console.input("[bold]you: [/]").strip()):
                pass
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        ids = text.chat([{"role": "user", "content": line}])
        decode = text.decoder()
        try:
            chosen = None if seed is None else turn
            for token in session.generate(torch.tensor([ids]), tokens, stop=text.stop, seed=chosen, **sampling):
                console.print(Text(decode(int(token))), end="", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" ...", end="")
        console.print()
        session.sleep(loops, wait=False)


def _status(session: Session) -> Text:
    """The window's filling, sleeps, and the memory of the stream."""
    stats, window = session.stats(), session.model.config.window
    place = f"{stats.window}/{window} tokens in the window" if window is not None else f"{stats.tokens} tokens"
    memory = f"state {decimal(stats.state_bytes)}, cache {decimal(stats.cache_bytes)}"
    return Text(f"{place}, {stats.sleeps} sleeps, {memory}", style="dim")

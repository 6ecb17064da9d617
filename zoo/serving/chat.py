"""Chat in the terminal: answers are printed as they are generated, and the model sleeps between turns."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from zoo.errors import ZooError, counted
from zoo.sessions.session import Session
from zoo.sessions.sleeping_model import sleeping_model
from zoo.text.tokenizers import ByteTokenizer


def converse(
    session: Session,
    tokenizer: ByteTokenizer,
    tokens: int,
    *,
    loops: int | None = None,
    seed: int | None = None,
    console: Console | None = None,
    **sampling: Any,
) -> None:
    """Answer each line until the input ends. Sleeps in the background while the user types.

    Args:
        tokens: maximum number of tokens in an answer.
        loops: passes per sleep; default as in the model.
        seed: seed of the first answer; each later answer uses the next integer.
        sampling: options of `Session.generate`.
    """
    if loops is not None:
        if (config := session.model.config).window is None:
            raise ZooError(f"loops: {loops}; {config.name} never sleeps (evict: {config.evict})")
        sleeping_model(session.model).check_loops(loops)
    console = console or Console()
    prompt = "[bold]you: [/]" if sys.stdin.isatty() else ""
    for turn in itertools.count(seed or 0):
        console.print(_status(session), justify="right")
        try:
            while not (line := console.input(prompt).strip()):
                pass
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        ids = tokenizer.chat([{"role": "user", "content": line}])
        decode = tokenizer.decoder(ids)
        try:
            turn_seed = None if seed is None else turn
            for token in session.generate(
                torch.tensor([ids], device=session.device), tokens, stop=tokenizer.stop, seed=turn_seed, **sampling
            ):
                if int(token) not in tokenizer.stop:
                    console.print(Text(decode(int(token))), end="", soft_wrap=True)
            console.print(Text(decode.flush()), end="", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" ...", end="")
        console.print()
        session.sleep(loops, wait=False)


def _status(session: Session) -> Text:
    """Return one line: how full the window is, the number of sleeps, and the memory of the stream."""
    stats, window = session.stats(), session.model.config.window
    filled = f"{stats.window}/{window} tokens in the window" if window is not None else counted(stats.tokens, "token")
    memory = f"state {decimal(stats.state_bytes)}, cache {decimal(stats.cache_bytes)}"
    return Text(f"{filled}, {counted(stats.sleeps, 'sleep')}, {memory}", style="dim")

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


class Conversation:
    """A conversation that a stream reads turn by turn: what it has read is not rendered into it again."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._messages: list[dict[str, str]] = []
        self._asked = self._read = ""
        """The conversation as text up to where the answer begins, and as much of it as the stream has read."""

    def ask(self, line: str) -> list[int]:
        """Return the ids from where the stream is to where the answer to a line begins. Raises ZooError: the template refuses it."""
        render, question = self._tokenizer.render, {"role": "user", "content": line}
        asked = render([*self._messages, question])
        known = [self._read, render(self._messages, add_generation_prompt=False)] if self._messages else [""]
        new = next((asked[len(text) :] for text in known if asked.startswith(text)), None)
        ids = self._tokenizer.encode(render([question]) if new is None else new, special=False)  # the template changes earlier text
        if not ids:
            raise ZooError("chat template: renders this message as empty text")
        self._messages.append(question)
        self._asked = asked
        return ids

    def answer(self, text: str, last: int | None) -> None:
        """Note what the model has said, and its last token."""
        self._messages.append({"role": "assistant", "content": text})
        end = "" if last is None or last not in self._tokenizer.stop else self._tokenizer.name_of(last)
        self._read = self._asked + text + end


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
    console, conversation = console or Console(), Conversation(tokenizer)
    prompt = "[bold]you: [/]" if sys.stdin.isatty() else ""
    for turn in itertools.count(seed or 0):
        console.print(_status(session), justify="right")
        try:
            while not (line := console.input(prompt).strip()):
                pass
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        try:
            ids = conversation.ask(line)
        except ZooError as error:
            console.print(Text(str(error)))
            continue
        decode, said, last = tokenizer.decoder(ids), "", None
        try:
            turn_seed = None if seed is None else turn % 2**63
            for token in session.generate(
                torch.tensor([ids], device=session.device), tokens, stop=tokenizer.stop, seed=turn_seed, **sampling
            ):
                last = int(token)
                piece = "" if last in tokenizer.stop else decode(last)
                said += piece
                console.print(Text(piece), end="", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" ...", end="")
        console.print(Text(rest := decode.flush()), soft_wrap=True)
        conversation.answer(said + rest, last)
        session.sleep(loops, wait=False)


def _status(session: Session) -> Text:
    """Return one line: how full the window is, the number of sleeps, and the memory of the stream."""
    stats, window = session.stats(), session.model.config.window
    filled = f"{stats.window}/{window} tokens in the window" if window is not None else counted(stats.tokens, "token")
    memory = f"state {decimal(stats.state_bytes)}, cache {decimal(stats.cache_bytes)}"
    return Text(f"{filled}, {counted(stats.sleeps, 'sleep')}, {memory}", style="dim")

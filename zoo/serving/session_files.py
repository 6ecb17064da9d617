"""Sessions as files with which another server can continue: a session file whose header also has the conversation."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from zoo.config import validate
from zoo.errors import ZooError
from zoo.serving.kept import KeptSession
from zoo.serving.store import Record
from zoo.sessions.file import read_file, write_file
from zoo.sessions.sleeping_model import SleepingModel
from zoo.sessions.snapshot import Snapshot

FIELD = "conversation"  # of the header


class Conversation(BaseModel):
    """The part of a session that its state does not hold."""

    model_config = ConfigDict(strict=True, extra="forbid")

    tokens: list[int]
    messages: list[dict[str, Any]]
    settings: dict[str, str]
    """Settings of the server on which the sleeps of a stream depend."""


def to_file(kept: KeptSession, model: SleepingModel, settings: dict[str, str]) -> bytes:
    """Return a session as the contents of a file."""
    conversation = Conversation(tokens=kept.tokens, messages=kept.messages, settings=settings)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        write_file(path, model, kept.session.snapshot(), {FIELD: conversation.model_dump_json()})
        return path.read_bytes()


def from_file(content: bytes, model: SleepingModel, settings: dict[str, str]) -> tuple[Snapshot, Record]:
    """Return the state and the conversation in a file. Raises ZooError if it is damaged, or of other weights or settings."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        path.write_bytes(content)
        try:
            snapshot = read_file(path, model)
            with safe_open(path, "pt") as file:
                header = file.metadata()
            conversation = validate(Conversation, json.loads(header.get(FIELD, "{}")), FIELD)
            _check(snapshot, conversation, model, settings)
        except ZooError as error:
            raise ZooError(str(error).removeprefix(f"{path}: ")) from None
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{FIELD}: not JSON: {error}") from None
    return snapshot, Record(conversation.tokens, snapshot.sleeps, conversation.messages)


def _check(snapshot: Snapshot, conversation: Conversation, model: SleepingModel, settings: dict[str, str]) -> None:
    """Raise ZooError unless the state can be that of one stream with these tokens."""
    tokens, counts = conversation.tokens, snapshot.counts
    if conversation.settings != settings:
        raise ZooError(f"settings: the session is for {conversation.settings}, this server has {settings}")
    if not all(0 <= token < model.config.vocab_size for token in tokens):
        raise ZooError(f"tokens: the vocabulary is 0 to {model.config.vocab_size - 1}")
    last = [*snapshot.ids.flatten().tolist(), *snapshot.pending.flatten().tolist()]
    numbers = [*counts, snapshot.state.position, snapshot.start.position, *(part for sleep in snapshot.sleeps for part in sleep)]
    if (
        len(snapshot.ids) != 1
        or len(tokens) != counts.tokens + snapshot.pending.shape[1]
        or tokens[len(tokens) - len(last) :] != last
        or not all(type(number) in (int, float) and number >= 0 for number in numbers)
        or max(snapshot.state.position, snapshot.start.position, counts.cached) > counts.tokens
    ):
        raise ZooError("tokens: they are not those of the state")

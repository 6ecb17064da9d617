"""Conversations as text: the chat template of a checkpoint, or one line per message."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from zoo.checkpoints.stored import read_json
from zoo.errors import ZooError

Messages = Iterable[Mapping[str, Any]]
"""Messages with a `role` and `content`, and anything else the template reads, such as `tool_calls`."""

DEFAULT, TOOLS = "default", "tool_use"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message holds its reasoning; templates read the first two."""
LEAST_OUTPUT, OUTPUT_PER_INPUT = 2**20, 4
"""A template may write this many characters, or this many for each character that it reads."""


def plain(messages: Messages, *, add_generation_prompt: bool = True) -> str:
    """Return one line per message, such as "user: hi", and the start of the answer. Raises ZooError: content that is not text."""
    messages = list(messages)
    for n, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise ZooError(f"messages.{n}.{field}: {message.get(field)!r}; without a chat template, want a text")
    lines = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
    return lines + ("assistant: " if add_generation_prompt else "")


def read_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a checkpoint's folder by name; the only one is called "default".

    They are read where transformers reads them: from chat_template.jinja and additional_chat_templates/NAME.jinja or, without these,
    from tokenizer_config.json, as a string or as a list of named ones. Raises ZooError.
    """
    found = {file.stem: _text(file) for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        found[DEFAULT] = _text(folder / "chat_template.jinja")
    if found or not (folder / "tokenizer_config.json").is_file():
        return found
    stated = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(stated, list):
        stated = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
    templates = stated if isinstance(stated, dict) else {} if stated is None else {DEFAULT: stated}
    if not all(isinstance(text, str) for text in (*templates, *templates.values())):
        raise ZooError(f"{folder / 'tokenizer_config.json'}: chat_template: want a template, or a list of objects with name and template")
    return templates


def choose(templates: Mapping[str, str], name: str | None, tools: object) -> str | None:
    """Return the template of this name or, without a name, the one that fits; None: there are no templates. Raises ZooError."""
    if not templates and name is None:
        return None
    chosen = name or (TOOLS if tools is not None and TOOLS in templates else DEFAULT)
    if chosen not in templates:
        raise ZooError(f"chat template: there is no '{chosen}'; allowed: {', '.join(templates) or 'none'}")
    return templates[chosen]


def render(template: str, messages: Messages, **variables: Any) -> str:
    """Render `messages` with a Jinja template, as transformers' `apply_chat_template` does.

    The template runs in a separate process, with limits on time, memory and output: it comes with the checkpoint and is not trusted.

    Args:
        variables: values that are JSON, such as `add_generation_prompt`, `tools`, `documents` and special tokens.
    Raises:
        ZooError: the template fails, or exceeds a limit.
    """
    given = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
    try:
        fields = json.dumps({**given, "messages": [_normalised(message) for message in messages]})
    except (TypeError, ValueError) as error:
        raise ZooError(f"chat template: messages and variables must be JSON: {error}") from None
    most = LEAST_OUTPUT + OUTPUT_PER_INPUT * len(fields)
    reply = _worker.ask(f'{{"template": {json.dumps(template)}, "most": {most}, "variables": {fields}}}')
    if "error" in reply:
        raise ZooError(f"chat template: {reply['error']}")
    return str(reply["text"])


class Worker:
    """The process that renders templates. It is started when it is first needed, and again after it has ended."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: str) -> dict[str, Any]:
        """Send a line of JSON and return the reply. Raises ZooError if a limit ends the process."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except (BrokenPipeError, ConnectionError):
                line = ""
            except BaseException:  # interrupted: the next request must not read this one's reply
                self.close()
                raise
            if not line:
                self.close()
                raise ZooError("chat template: takes too long, or the process that renders it cannot run")
            reply: dict[str, Any] = json.loads(line)
            return reply

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():  # a fork must not share it
            if importlib.util.find_spec("jinja2") is None:
                raise ZooError("chat template: needs pip install 'sleep-zoo[serve]'")
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        return self._process

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()


_worker = Worker()
atexit.register(_worker.close)


def _normalised(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drop fields that are None, which few templates expect, and copy reasoning to the names that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ZooError(f"{file}: cannot be read: {error}") from None

"""Conversations as text: the chat template of a checkpoint, or one line per message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zoo.errors import ZooError

Messages = Iterable[Mapping[str, str]]


def plain(messages: Messages) -> str:
    """Return one line per message, such as "user: hi", and the start of the answer."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


def render(template: str, messages: Messages, special: Mapping[str, Any]) -> str:
    """Render `messages` with a Jinja template, up to where the answer begins.

    The template runs in a sandbox: it comes with the checkpoint and is not trusted.

    Args:
        special: the tokenizer's special tokens, by names such as "eos_token".
    Raises:
        ZooError: the template fails.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(template).render(messages=list(messages), add_generation_prompt=True, **special)
    except Exception as error:  # a template may raise anything
        raise ZooError(f"tokenizer_config.json: chat_template: {error}") from None

"""Token ids of conversations, and where their messages end."""

from __future__ import annotations

import re
from typing import Any

from zoo.errors import ZooError
from zoo.serving.kept import Messages
from zoo.serving.prefixes import common_length
from zoo.text.tokenizers import ByteTokenizer

Tools = list[dict[str, Any]] | None


def chat_ids(tokenizer: ByteTokenizer, messages: Messages, tools: Tools) -> list[int]:
    """Return the ids of a conversation, up to where the answer begins. Raises ZooError."""
    return tokenizer.chat(messages, **({"tools": tools} if tools else {}))


def message_ends(tokenizer: ByteTokenizer, messages: Messages, tools: Tools, ids: list[int]) -> set[int]:
    """Return the positions in `ids`, a rendered conversation, where the system prompt and the last message but one end.

    Other conversations are likely to continue from there: those of other users, and edited ones.
    """
    system = next((n for n, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    ends = set()
    for count in {system, len(messages) - 1} - {0}:
        try:
            part = tokenizer.chat(messages[:count], add_generation_prompt=False, **({"tools": tools} if tools else {}))
        except ZooError:  # a template may refuse a part of a conversation
            continue
        ends.add(common_length(part, ids))
    return ends


def takes_tools(tokenizer: ByteTokenizer) -> bool:
    """Return whether a chat template of the tokenizer reads `tools`."""
    return any(re.search(r"\btools\b", template) for template in tokenizer.templates.values())

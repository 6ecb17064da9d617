"""The process that renders chat templates: one JSON request per line on stdin, one JSON reply per line on stdout.

A template comes with a checkpoint and is not trusted. Here it has access to its input only, in Jinja's sandbox, and the kernel ends
the process when it uses too much time. The environment is that of transformers' `apply_chat_template`. The worker is started as a
file, so that nothing else is imported.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 0.5
"""CPU time of one rendering."""
MEMORY = 2**29
"""Bytes of address space, where the system can limit them."""


class Generation(Extension):
    """Tag `{% generation %}`, which marks what the assistant wrote; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> Any:
        return caller()


class Dict:
    """Stand-in for `dict` in a template, without the attributes of the type."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class GuardedNamespace(Namespace):
    """Stand-in for `namespace` in a template; refuses names that begin with an underscore."""

    def __init__(*args: Any, **fields: Any) -> None:  # so that a field may be called self
        self, *rest = args
        attributes = dict(*rest, **fields)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(8)
def compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= {"dict": Dict(), "namespace": GuardedNamespace}
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any], most: int) -> str:
    """Return the text of a template. Raises an exception of any type if it fails, or writes more than `most` characters."""

    def bounded() -> Iterator[str]:
        length = 0
        for piece in compiled(template).generate(**variables):
            length += len(piece)
            if length > most:
                raise TemplateError(f"writes more than {most} characters")
            yield piece

    return "".join(bounded())


def limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):  # another system
        pass


def limit_time(seconds: float) -> None:
    """End the process after this time, even inside a single operation; 0: no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
    elif seconds:
        with open(os.devnull, "w") as nowhere:
            faulthandler.dump_traceback_later(2 * seconds, exit=True, file=nowhere)
    else:
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    limit_memory()
    for line in sys.stdin:
        limit_time(SECONDS)
        try:
            reply = {"text": render(**json.loads(line))}
        except RecursionError:
            reply = {"error": "nested too deeply"}
        except MemoryError:
            reply = {"error": "needs too much memory"}
        except Exception as error:  # a template may raise anything
            reply = {"error": " ".join(f"{error or type(error).__name__}".split())[:300]}
        text = json.dumps(reply)
        limit_time(0)
        print(text, flush=True)


if __name__ == "__main__":
    main()

"""The group of all commands, how it lists them, and how it reports errors."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from zoo.errors import ZooError
from zoo.signals import StoppedError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
SECTIONS = {
    "Models": ("list", "describe", "convert", "push"),
    "Training": ("tokenize", "train", "eval", "lm-eval", "ablate", "plot", "probe", "demo"),
    "Inference": ("chat", "serve"),
    "This machine": ("doctor",),
}


@contextmanager
def exit_status() -> Iterator[None]:
    """Report bad input in one line and exit with status 2. A command that a signal stopped exits with 128 + its number.

    Warnings take one line, too. Characters that the terminal cannot show are written as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *place: f"Warning: {message}\n"
    try:
        yield
    except ZooError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output has ended; click handles it
        raise
    except OSError as error:
        click.echo(f"Error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except StoppedError as stopped:
        from zoo.training.parallel import is_main_process

        if is_main_process():
            click.echo(str(stopped), err=True)
        sys.exit(stopped.status)


class Group(click.Group):
    """Group that lists its commands in sections and prints one-line errors."""

    def invoke(self, ctx: click.Context) -> Any:
        with exit_status():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(80)) for name in names])


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="sleep-zoo")
def main() -> None:
    """A model zoo of language models that sleep."""

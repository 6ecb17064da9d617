"""The `zoo` command. torch is imported by the commands that need it, not by `--help` or `zoo list`."""

from zoo.cli import inference, models, training  # noqa: F401  (each adds its commands)
from zoo.cli.group import CONTEXT, SECTIONS, exit_status, main

__all__ = ["CONTEXT", "SECTIONS", "exit_status", "main"]

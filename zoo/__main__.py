"""The commands `zoo` and `zoo-export`, `python -m zoo`, and `torchrun -m zoo`."""

import importlib

from zoo.signals import exit_on_signals, restore_defaults


def run(module: str = "zoo.cli", name: str = "zoo") -> None:
    """Run a command. A signal ends it without a traceback, also while packages are imported or the interpreter shuts down."""
    exit_on_signals()
    try:
        importlib.import_module(module).main(prog_name=name)
    finally:
        restore_defaults()


def run_export() -> None:
    """Run the command `zoo-export`."""
    run("zoo.export.cli", "zoo-export")


if __name__ == "__main__":
    run()

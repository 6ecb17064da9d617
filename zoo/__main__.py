"""The command `zoo`, `python -m zoo`, and `torchrun -m zoo`."""

import signal

from zoo.signals import exiting


def run() -> None:
    """Run the command line. Ctrl-C while packages are imported, or while the interpreter shuts down, leaves no traceback."""
    with exiting():
        from zoo.cli import main
    try:
        main(prog_name="zoo")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()

"""Signals wait while a block of work is under way, and are not lost afterwards."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from zoo.signals import STOPPING, deferred


@pytest.fixture
def received():
    """Numbers of the signals that reach the handlers from outside."""
    numbers = []
    before = {number: signal.signal(number, lambda number, frame: numbers.append(number)) for number in STOPPING}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_that_was_asked_for_is_handled(received, number):
    with deferred() as requested:
        assert requested() == 0
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert requested() == number
    assert received == []
    signal.raise_signal(number)
    assert received == [number]


def test_a_signal_that_was_not_asked_for_is_raised_after_the_block(received):
    with deferred() as requested:
        assert requested() == 0
        signal.raise_signal(signal.SIGUSR1)
        assert received == []
    assert received == [signal.SIGUSR1]


def test_a_handler_of_the_program_around_python_is_not_touched(received, monkeypatch):
    """Python knows it as None, and could not set it again."""
    known = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else known(number))
    with deferred() as requested:
        signal.raise_signal(signal.SIGUSR1)
        assert (requested(), received) == (0, [signal.SIGUSR1])


def test_another_thread_defers_nothing(received):
    found = []

    def work():
        with deferred() as requested:
            signal.raise_signal(signal.SIGUSR2)
            found.append(requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]
    assert received == [signal.SIGUSR2]


SCRIPT = """
import signal, time
from zoo.signals import deferred, exit_on_signals
exit_on_signals()
with deferred() as requested:
    for pause in {pauses}:
        time.sleep(pause)
        signal.raise_signal(signal.SIGINT)
        requested()
print("saved")
"""


@pytest.mark.parametrize(("pauses", "saved"), [((0, 0), True), ((0, 2.1), False)])
def test_a_second_ctrl_c_ends_the_process_at_once(pauses, saved):
    """Not one that follows directly: torchrun repeats the Ctrl-C that its processes got from the terminal."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(pauses=pauses)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == ((0, "saved\n") if saved else (130, ""))


MODULE = """
import atexit, signal
stop = lambda: signal.raise_signal({number})
atexit.register(lambda: stop() if {moment!r} == "exit" else None)
stop() if {moment!r} == "import" else None
def main(prog_name): stop() if {moment!r} == "main" else None
"""


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("moment", ["import", "main", "exit"])
def test_a_signal_ends_a_command_without_a_traceback(tmp_path, moment, number):
    (tmp_path / "stopped.py").write_text(MODULE.format(moment=moment, number=int(number)))
    script = "from zoo.__main__ import run; run('stopped', 'zoo')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == (-number if moment == "exit" else 128 + number)
    assert done.stderr == ""


UNFINISHED = """
import signal, sys
from pathlib import Path
from zoo.files import new_folder, replacing
from zoo.signals import exit_on_signals
exit_on_signals()
with new_folder(Path("a/folder")) as outer, new_folder(outer / "inner") as inner, replacing(Path("file")) as file:
    (inner / "weights").write_text("half")
    file.write_text("half")
    signal.raise_signal(int(sys.argv[1]))
"""


@pytest.mark.parametrize("number", STOPPING[:2])
def test_a_command_that_a_signal_ends_leaves_no_unfinished_files(tmp_path, number):
    done = subprocess.run([sys.executable, "-c", UNFINISHED, str(int(number))], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]

"""Interrupt commands at random moments, start them again, and compare the end with that of an uninterrupted one.

python -m tests.zoo.training.interruptions FOLDER SEED train=15 process=3 ablate=2 torchrun=0 demo=0

Prints a JSON object: the number of interruptions, and the problems found. `train`, `ablate` and `demo` are forks of this process,
which has imported everything; `process` and `torchrun` are `zoo train` from the first moment of the interpreter to the last.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch._dynamo

import zoo.cli
import zoo.demo
import zoo.training.ablation
import zoo.training.loop
from tests.zoo.training.tiny import TINY
from zoo.__main__ import run
from zoo.training.config import read_config

if find_spec("tensorboard"):
    import torch.utils.tensorboard

ROOT = Path(__file__).parents[3]
RUN = {**TINY, "steps": 8, "muon_lr": 0.02, "checkpoint_every": 3}
PLAN = {"base": RUN, "grid": {"lr": [0.001, 0.002]}, "seeds": [0], "match": ["tokens"]}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL)
END = {"ablate": "table.md", "demo": "results.json"}
"""The file that a command writes last."""


def command(kind, out):
    (out.parent / "config.yaml").write_text(json.dumps(PLAN if kind == "ablate" else RUN))
    options = ("--processes", "2") if kind == "ablate" else ()
    name = kind if kind in END else "train"
    return ["zoo", name, *(() if kind == "demo" else (str(out.parent / "config.yaml"),)), "--out", str(out), *options]


def start(kind, out):
    """Start the command in a session of its own; returns its process id. Its output goes to the file `log`."""
    arguments = command(kind, out)
    log = out.parent / "log"
    if kind in ("process", "torchrun"):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if kind == "torchrun" else []
        with log.open("w") as file:
            started = subprocess.Popen(
                [sys.executable, *launch, "-m", *arguments], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
        started.returncode = 0  # this module waits for it
        return started.pid
    if (pid := os.fork()) == 0:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = arguments
        if kind == "demo":
            zoo.demo.read_config = lambda name: read_config(name, {"steps": 3, "eval_sequences": 8})
            zoo.demo.SEQUENCES = 64
        status = 1
        try:
            run()
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
        os._exit(status)
    return pid


def ended(pid):
    """True for a process that has ended, or is past its last instruction (PF_EXITING), where signals have no effect."""
    flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
    return bool(flags & 4)


def wait(pid, seconds=300):
    end = time.monotonic() + seconds
    while not ended(pid):
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def members(session, out):
    """Return the living processes of a session, and those of the ranks of torchrun, which have sessions of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            arguments = (stat.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if state != "Z" and (int(its) == session or os.fsencode(out) in arguments):
            found.append(int(stat.parent.name))
    return found


def send(kind, pid, number, out):
    """Send a signal the way a terminal, a batch system or the kernel does."""
    if number == signal.SIGINT or (kind == "torchrun" and number == signal.SIGKILL):
        os.killpg(pid, number)
    elif kind == "torchrun" and number in (signal.SIGUSR1, signal.SIGUSR2):
        ranks = [member for member in members(pid, out) if member != pid]
        os.kill(ranks[-1] if ranks else pid, number)
    else:
        os.kill(pid, number)


def metrics(out):
    return {file.parent.relative_to(out): file.read_bytes() for file in out.rglob("metrics.jsonl")} if out.exists() else {}


def outcome(out):
    """Return the steps and losses of every run in a folder, and a hash of its weights."""
    runs = {}
    for name, text in metrics(out).items():
        digest = hashlib.sha256()
        for key, tensor in zoo.load(out / name).state_dict().items():
            digest.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        lines = [json.loads(line) for line in text.splitlines()]
        runs[str(name)] = ([(line["step"], line["loss"]) for line in lines], digest.hexdigest())
    return runs


def logged(out):
    """Return what the command has printed; nothing if it was killed before it could."""
    log = out.parent / "log"
    return log.read_text() if log.exists() else ""


def finished(kind, out):
    return (out / END.get(kind, "results.json")).exists()


def interrupt(kind, out, chance, duration):
    """Interrupt a command up to three times, then let it finish. Returns the number of interruptions, and the problems."""
    problems, count = [], 0
    for _ in range(chance.randint(1, 3)):
        before = metrics(out)
        pid = start(kind, out)
        moment, number = chance.uniform(0, 1.05 * duration), chance.choice(SIGNALS)
        time.sleep(moment)
        interrupted = not ended(pid)
        if interrupted:
            send(kind, pid, number, out)
            count += 1
        status, log = wait(pid), logged(out)
        what = f"{out.parent.name}: {number.name} after {moment:.2f} s of {duration:.2f}"
        if interrupted and (status == 0 or (kind != "torchrun" and status not in (128 + number, -number))):
            problems.append(f"{what}: status {status}: {log[-300:]}")
        # before its first line of ours, Python itself reports Ctrl-C with a traceback
        if kind != "torchrun" and "Traceback" in log and (kind != "process" or "__main__.py" in log):
            problems.append(f"{what}: {log[-1500:]}")
        if not interrupted and status:
            problems.append(f"{what}: not interrupted, status {status}: {log[-1500:]}")
        end = time.monotonic() + 60
        while members(pid, out) and time.monotonic() < end:
            time.sleep(0.02)
        for left in members(pid, out):
            problems.append(f"{what}: process {left} is left")
            os.kill(left, signal.SIGKILL)
        after = metrics(out)
        for name, text in before.items():
            if not after[name].startswith(text[: text.rfind(b"\n") + 1]):
                problems.append(f"{what}: {name}: metrics were overwritten")
        if finished(kind, out):
            break
    return count, problems


def trial(kind, out, chance, duration, expected):
    out.parent.mkdir(parents=True)
    count, problems = interrupt(kind, out, chance, duration)
    if not finished(kind, out) and (status := wait(start(kind, out), 3000)):
        problems.append(f"{out.parent.name}: started again, status {status}: {(out.parent / 'log').read_text()[-1500:]}")
    elif outcome(out) != expected:
        problems.append(f"{out.parent.name}: another outcome than without interruptions")
    if scratch := [str(path) for path in out.parent.rglob(".*")]:
        problems.append(f"{out.parent.name}: left behind: {scratch}")
    return count, problems


def main(folder, seed, wanted):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # in forks that have not reached the command yet
    chance, total, problems = random.Random(seed), 0, []
    for kind, least in wanted.items():
        out = folder / f"{kind}-whole" / "out"
        out.parent.mkdir(parents=True)
        begun = time.monotonic()
        assert wait(start(kind, out), 3000) == 0, logged(out)
        duration, expected, count, number = time.monotonic() - begun, outcome(out), 0, 0
        while count < least:
            more, found = trial(kind, folder / f"{kind}-{number}" / "out", chance, duration, expected)
            count, problems, number = count + more, problems + found, number + 1
        total += count
    print(json.dumps({"interruptions": total, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), {kind: int(n) for kind, _, n in (part.partition("=") for part in sys.argv[3:]) if int(n)})

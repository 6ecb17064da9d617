"""Seeded damage to the files that we read, and the reader of each. A damaged file is refused in one line, or read.

python -m tests.zoo.mutations FOLDER COUNT SEED [ours]

Prints the problems found; with `ours`, only files that carry checksums are damaged.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

import zoo
import zoo.export
from tests.zoo.training.tiny import TINY, tiny
from zoo.export.manifest import digest
from zoo.sessions.file import read_file
from zoo.tasks import new_task
from zoo.text.tokenizers import load_tokenizer
from zoo.training.config import read_config
from zoo.training.loop import prepare, train
from zoo.training.plan import arms_of, read_plan, runs_of
from zoo.training.plots import read_run
from zoo.training.run_folder import RunFolder

SECONDS, BYTES = 20, 2 * 2**30
ORACLES = Path(__file__).parents[1] / "data" / "oracles"
FAMILIES = ("llama-swa-a", "mamba2-a", "jet-nemotron-a", "gdn-qwen3_5-a", "ouro-a", "samba-a")


class Kind(NamedTuple):
    """A file that we read."""

    folder: str
    """Folder of whole files."""
    file: str
    """The file to damage."""
    read: Callable[[Path], Any]
    """Read the folder; returns what was read. Raises ZooError."""
    form: str = "bytes"
    """bytes, json, jsonl or yaml."""
    ours: bool = False
    """True if it carries a checksum: a damaged one that is accepted must have the same content."""


# --- damage ---------------------------------------------------------------------------------------------------------------------


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    content, kind = bytearray(content), chance.choice(["flip", "flip", "cut", "zero", "insert", "repeat", "junk"])
    at = chance.randrange(len(content)) if chance.random() < 0.5 else min(chance.randrange(400), len(content) - 1)
    part = chance.choice([1, 8, 64])
    if kind == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        content[at : at + part] = bytes(len(content[at : at + part]))
    elif kind == "insert":
        content[at:at] = chance.randbytes(part)
    elif kind == "repeat":
        content[at:at] = content[at : at + part]
    else:
        content[at : at + part] = chance.randbytes(len(content[at : at + part]))
    return bytes(content)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: 0, lambda: -1, lambda: 1.5, lambda: math.nan, lambda: math.inf, lambda: 2**63, lambda: 10**30,
    lambda: 10**9, lambda: "", lambda: "text", lambda: "x" * 100_000, lambda: "../../etc/passwd", lambda: "/dev/zero", lambda: "a\nb",
    list, dict, lambda: [1, "a"], lambda: {"a": 1}, lambda: deep(50),
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def damage_tree(tree: Any, chance: random.Random) -> Any:
    found = list(places(tree))
    if not found:
        return chance.choice(VALUES)()
    *path, key = chance.choice(found)
    owner = tree
    for step in path:
        owner = owner[step]
    kind = chance.choice(["value", "value", "value", "missing", "extra"])
    if kind == "value":
        owner[key] = chance.choice(VALUES)()
    elif kind == "missing":
        del owner[key]
    elif isinstance(owner, dict):
        owner[chance.choice(["extra", "", "../x", "a.b", "x" * 1000])] = chance.choice(VALUES)()
    else:
        owner.insert(0, chance.choice(VALUES)())
    return tree


def damaged(content: bytes, form: str, chance: random.Random) -> bytes:
    """Return other bytes: of a text, half of the time well-formed ones with another value."""
    while True:
        if form == "bytes" or chance.random() < 0.4:
            changed = damage_bytes(content, chance)
        elif form == "yaml":
            changed = yaml.safe_dump(damage_tree(yaml.safe_load(content), chance), sort_keys=False).encode()
        elif form == "jsonl":
            lines = content.decode().splitlines()
            at = chance.randrange(len(lines))
            lines[at] = json.dumps(damage_tree(json.loads(lines[at]), chance))
            changed = "".join(f"{line}\n" for line in lines).encode()
        else:
            changed = json.dumps(damage_tree(json.loads(content), chance)).encode()
        if changed != content:
            return changed


# --- the files and their readers ------------------------------------------------------------------------------------------------

MODEL = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 300, "window": 8, "evict": "hard", "loops": 2}
RUN = {**TINY, "steps": 4, "checkpoint_every": 2}
LENGTHS = {"name": "text", "train": "train.npy", "test": "test.npy", "vocab": 50, "length": 16, "width": 8}


def make(folder: Path) -> list[Kind]:
    """Write whole files of every kind into `folder`."""
    zoo.save(zoo.create("gdn4", **MODEL), folder / "model")
    kinds = [
        Kind("model", "zoo.yaml", weights, "yaml"),
        Kind("model", "model.safetensors", weights, ours=True),
    ]
    for family in FAMILIES:
        (folder / family).mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(ORACLES / family / name, folder / family)
        kinds += [Kind(family, "config.json", weights, "json"), Kind(family, "model.safetensors", finite)]
    kinds += [sharded(folder, "index"), pickled(folder, "pickled")]
    kinds += tokenizer(folder, "tokenizer")
    session = zoo.Session(zoo.load(folder / "model"))
    session.feed(torch.arange(13).view(1, -1))
    (folder / "session").mkdir()
    session.save(folder / "session" / "stream")
    kinds.append(Kind("session", "stream", lambda place: stream(session, place / "stream"), ours=True))
    train(tiny(**{name: RUN[name] for name in ("steps", "checkpoint_every")}), folder / "run")
    shutil.copytree(folder / "run", folder / "begun", ignore=lambda *_: ["results.json", "model.safetensors", "zoo.yaml"])
    shutil.copytree(folder / "run" / "checkpoints", folder / "begun" / "checkpoints", dirs_exist_ok=True)
    last = "checkpoints/00000004/"
    kinds += [
        Kind("run", "train.yaml", settings, "yaml"),
        Kind("run", "results.json", lambda place: read_run(place) and None, "json"),
        Kind("run", "metrics.jsonl", lambda place: read_run(place) and None, "jsonl"),
        Kind("begun", "metrics.jsonl", lambda place: RunFolder(place, begun(folder)).trim_metrics(), "jsonl"),
        *(Kind("begun", last + name, lambda place: resumed(place, begun(folder)), form, ours=True) for name, form in CHECKPOINT.items()),
    ]
    (folder / "plan").mkdir()
    plan = {"base": RUN, "grid": {"lr": [0.001, 0.002]}, "arms": {"longer": {"overrides.d_model": 32}}, "seeds": [0]}
    (folder / "plan" / "plan.yaml").write_text(yaml.safe_dump(plan))
    kinds.append(Kind("plan", "plan.yaml", planned, "yaml"))
    (folder / "tokens").mkdir()
    np.save(folder / "tokens" / "train.npy", np.arange(50, dtype=np.uint16))
    np.save(folder / "tokens" / "test.npy", np.arange(40, dtype=np.uint16))
    kinds.append(Kind("tokens", "train.npy", tokens))
    zoo.export.export(zoo.load(folder / "model"), folder / "bundle", verified=False)
    kinds.append(Kind("bundle", "bundle.json", exported, "json"))
    for path in sorted((folder / "bundle").iterdir()):
        if path.suffix in (".onnx", ".bin"):
            kinds += [Kind("bundle", path.name, exported, ours=True), Kind("bundle", path.name, renewed)]
    return kinds


CHECKPOINT = {"model.safetensors": "bytes", "optimizer.safetensors": "bytes", "progress.json": "json", "zoo.yaml": "yaml"}


def sharded(folder: Path, name: str) -> Kind:
    tensors = load_file(ORACLES / "llama-swa-a" / "model.safetensors")
    (folder / name).mkdir()
    shutil.copy(ORACLES / "llama-swa-a" / "config.json", folder / name)
    save_file(tensors, folder / name / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    return Kind(name, "model.safetensors.index.json", weights, "json")


def pickled(folder: Path, name: str) -> Kind:
    (folder / name).mkdir()
    shutil.copy(ORACLES / "llama-swa-a" / "config.json", folder / name)
    torch.save(load_file(ORACLES / "llama-swa-a" / "model.safetensors"), folder / name / "pytorch_model.bin")
    return Kind(name, "pytorch_model.bin", finite)


def tokenizer(folder: Path, name: str) -> list[Kind]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    (folder / name).mkdir()
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1, "user": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / name / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{{ eos_token }}"
    (folder / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    (folder / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [3], "temperature": 0.7}))
    return [Kind(name, f"{file}.json", chat, "json") for file in ("tokenizer", "tokenizer_config", "generation_config")]


def weights(folder: Path) -> Any:
    return zoo.load(folder).state_dict()


def finite(folder: Path) -> None:
    """Read upstream weights, in which nothing accepted may be infinite or NaN."""
    assert all(tensor.isfinite().all() for tensor in weights(folder).values()), "not finite"


def chat(folder: Path) -> None:
    made = load_tokenizer(folder, 100)
    assert all(type(token) is int for token in made.stop), f"end tokens {made.stop}"
    assert all(token < 100 for token in made.chat([{"role": "user", "content": "hi"}]))
    decode = made.decoder()
    "".join(map(decode, (1, 2)))


def stream(session: zoo.Session, file: Path) -> Any:
    session.fork().load(file)
    leaves = torch.utils._pytree.tree_leaves(read_file(file, session._model))
    return [x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in leaves if x is not None]


def settings(folder: Path) -> None:
    prepare(read_config(folder / "train.yaml"), torch.device("meta"))


def begun(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "run" / "train.yaml").read_text())


def resumed(folder: Path, fields: dict[str, Any]) -> Any:
    """Return the tensors that a run resumes from; an older checkpoint means that the damage was noticed."""
    chosen = RunFolder(folder, fields).newest_whole()
    return zoo.load(chosen).state_dict() if chosen.name == "00000004" else None


def planned(folder: Path) -> None:
    plan = read_plan(folder / "plan.yaml")
    runs_of(plan, arms_of(plan))


def tokens(folder: Path) -> None:
    task = new_task({**LENGTHS, "train": str(folder / "train.npy"), "test": str(folder / "test.npy")})
    task.batch(0, 0, 4)


def renewed(folder: Path) -> None:
    """Open a bundle whose manifest has the checksums of its damaged files."""
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["sha256"] = {name: digest(folder / name) for name in manifest["sha256"]}
    rewrite(folder / "bundle.json", json.dumps(manifest).encode())
    exported(folder)


def exported(folder: Path) -> Any:
    return [zoo.export.load(folder).feed(torch.arange(13).view(1, -1))]


# --- running --------------------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return a is None or (a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b))
    return b is None or (len(a) == len(b) and all(map(torch.equal, a, b)))


def outcome(kind: Kind, place: Path, whole: Any) -> str:
    """Read a damaged folder; returns the problem, or "" if there is none."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = kind.read(place)
    except zoo.ZooError as error:
        lines = str(error).splitlines()
        return "" if len(lines) == 1 and len(lines[0]) < 2100 else f"{len(lines)} lines, {len(str(error))} characters: {str(error)[:200]}"
    except BaseException as error:
        return f"{type(error).__module__}.{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "" if not kind.ours or same(content, whole) else "accepted"


def attempts(folder: Path, kind: Kind, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    chance = random.Random(f"{kind.folder} {kind.file} {seed}")
    content = (folder / kind.folder / kind.file).read_bytes()
    for number in range(count):
        yield number, damaged(content, kind.form, chance)


def try_all(folder: Path, kind: Kind, count: int, seed: int) -> list[str]:
    """Read `count` damaged files in forks of this process, within bounds of time and memory. Returns the problems."""
    problems, first = [], 0
    whole = kind.read(folder / kind.folder)
    while first < count:
        receive, send = os.pipe()
        if (child := os.fork()) == 0:
            os.close(receive)
            bound()
            silence()
            for number, content in attempts(folder, kind, count, seed):
                if number >= first:
                    place = folder / f"try-{kind.folder}"
                    shutil.rmtree(place, ignore_errors=True)
                    shutil.copytree(folder / kind.folder, place, copy_function=os.link)
                    rewrite(place / kind.file, content)
                    found = outcome(kind, place, whole)
                    os.write(send, pickle.dumps(found[:400].ljust(400)))
            os._exit(0)
        os.close(send)
        size = len(pickle.dumps(" " * 400))
        while first < count and (answer := received(receive, size)) is not None:
            found = pickle.loads(answer).strip()
            problems += [f"{kind.folder}/{kind.file} {first}: {found}"] if found else []
            first += 1
        os.close(receive)
        if first < count:  # this one ended the process, or had to be ended
            os.kill(child, signal.SIGKILL)
            problems.append(f"{kind.folder}/{kind.file} {first}: crashed, or took {SECONDS} s or {BYTES} bytes")
            first += 1
        os.waitpid(child, 0)
    return problems


def rewrite(file: Path, content: bytes) -> None:
    """Write a file that may be a hard link to a whole one."""
    file.unlink()
    file.write_bytes(content)


def received(pipe: int, size: int) -> bytes | None:
    end, content = time.monotonic() + SECONDS, b""
    while len(content) < size:
        ready, _, _ = select.select([pipe], [], [], max(0, end - time.monotonic()))
        part = os.read(pipe, size - len(content)) if ready else b""
        if not part:
            return None
        content += part
    return content


def bound() -> None:
    """Bound the memory that this process may add to what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def silence() -> None:
    """Let runtimes that print to standard error print nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)


def find(folder: Path, count: int, seed: int, only: Callable[[Kind], bool] = lambda kind: True) -> tuple[int, list[str]]:
    """Damage about `count` files, evenly over the kinds. Returns how many, and the problems."""
    torch.set_num_threads(1)
    kinds = [kind for kind in make(folder) if only(kind)]
    each = -(-count // len(kinds))
    problems = []
    for kind in kinds:
        problems += try_all(folder, kind, each, seed)
    return each * len(kinds), problems


if __name__ == "__main__":
    place, count, seed, *words = sys.argv[1:]
    tried, problems = find(Path(place), int(count), int(seed), only=lambda kind: kind.ours or not words)
    print("\n".join([*problems, f"{tried} files, {len(problems)} problems"]))

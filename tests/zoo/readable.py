"""The files that we read: a whole one of each, and a function that reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

import zoo
import zoo.export
from tests.zoo.training.tiny import TINY, tiny
from zoo.checkpoints.stored import INDEX, PICKLED, PICKLED_INDEX, WEIGHTS
from zoo.checkpoints.upstream import MAY_BE_ZERO
from zoo.export.manifest import MANIFEST, digest
from zoo.serving.store import Record, Store
from zoo.sessions.file import read_file
from zoo.tasks import new_task
from zoo.text.corpus import documents
from zoo.text.tokenizers import load_tokenizer
from zoo.training.config import read_config
from zoo.training.loop import prepare, train
from zoo.training.plan import arms_of, read_plan, runs_of
from zoo.training.plots import read_run
from zoo.training.run_folder import RunFolder

ORACLES = Path(__file__).parents[1] / "data" / "oracles"
MODEL = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 300, "window": 8, "evict": "hard", "loops": 2}
RUN = {**TINY, "steps": 4, "checkpoint_every": 2}
LAST = "checkpoints/00000004"
CHECKPOINT = {"model.safetensors": "bytes", "optimizer.safetensors": "bytes", "progress.json": "json", "zoo.yaml": "yaml"}


class Kind(NamedTuple):
    """A file that we read."""

    folder: str
    """Folder of whole files."""
    file: str
    """The file to damage."""
    read: Callable[[Path], Any]
    """Read the folder; returns what was read. Raises ZooError."""
    form: str = "bytes"
    """See `damage.damaged`."""
    ours: bool = False
    """True if it carries a checksum: a damaged one that is accepted must have the same content."""


def make(folder: Path, oracles: Sequence[str]) -> list[Kind]:
    """Write whole files of every kind but bundles into `folder`; upstream's are those in the folders `oracles`."""
    zoo.save(zoo.create("gdn4", **MODEL), folder / "model")
    kinds = [Kind("model", "zoo.yaml", weights, "yaml"), Kind("model", WEIGHTS, weights, ours=True)]
    for oracle in oracles:
        (folder / oracle).mkdir()
        for name in ("config.json", WEIGHTS):
            shutil.copy(ORACLES / oracle / name, folder / oracle)
        kinds += [Kind(oracle, "config.json", weights, "json"), Kind(oracle, WEIGHTS, finite)]
    makers = (sharded, pickled, tokenizer, sessions, runs, plans, data)
    return kinds + [kind for maker in makers for kind in maker(folder)]


def weights(folder: Path) -> Any:
    return zoo.load(folder).state_dict()


def finite(folder: Path) -> None:
    """Read upstream weights, in which nothing accepted may be infinite or NaN, or all zero where none is."""
    for name, tensor in weights(folder).items():
        assert tensor.isfinite().all(), f"{name} is not finite"
        assert tensor.ndim < 2 or tensor.any() or name.endswith(MAY_BE_ZERO), f"{name} is zero"


def sharded(folder: Path) -> list[Kind]:
    tensors, kinds = load_file(ORACLES / "llama-swa-a" / WEIGHTS), []
    for name, index, shard in (("index", INDEX, "a.safetensors"), ("pickled-index", PICKLED_INDEX, "a.bin")):
        (folder / name).mkdir()
        shutil.copy(ORACLES / "llama-swa-a" / "config.json", folder / name)
        (save_file if index == INDEX else torch.save)(tensors, folder / name / shard)
        (folder / name / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
        kinds.append(Kind(name, index, weights, "json"))
    return kinds


def pickled(folder: Path) -> list[Kind]:
    for oracle, name in (("llama-swa-a", PICKLED), ("samba-a", "model.pth")):
        (folder / name).mkdir()
        shutil.copy(ORACLES / oracle / "config.json", folder / name)
        torch.save(load_file(ORACLES / oracle / WEIGHTS), folder / name / name, _use_new_zipfile_serialization=name == PICKLED)
    return [Kind(name, name, finite, "pickle") for name in (PICKLED, "model.pth")]


def tokenizer(folder: Path) -> list[Kind]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    for place in (folder / "tokenizer", folder / "templates" / "additional_chat_templates"):
        place.mkdir(parents=True)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1, "user": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{{ eos_token }}"
    files = {
        "tokenizer.json": words.to_str(),
        "tokenizer_config.json": json.dumps({"chat_template": template, "eos_token": "</s>"}),
        "generation_config.json": json.dumps({"eos_token_id": [3], "temperature": 0.7}),
    }
    for name, text in files.items():
        (folder / "tokenizer" / name).write_text(text)
        (folder / "templates" / name).write_text(text)
    templates = ("chat_template.jinja", "additional_chat_templates/default.jinja")
    (folder / "templates" / templates[0]).write_text(template)
    return [Kind("tokenizer", name, chat, "json") for name in files] + [Kind("templates", templates[0], chat, "template")]


def chat(folder: Path) -> None:
    made = load_tokenizer(folder, 100)
    assert all(type(token) is int for token in made.stop), f"end tokens {made.stop}"
    assert all(token < 100 for token in made.chat([{"role": "user", "content": "hi"}]))
    decode = made.decoder()
    "".join(map(decode, (1, 2)))


def sessions(folder: Path) -> list[Kind]:
    """A session file, and a session that a server keeps."""
    session = zoo.Session(zoo.load(folder / "model"))
    session.feed(torch.arange(13).view(1, -1))
    (folder / "session").mkdir()
    session.save(folder / "session" / "stream")
    journal = Store(folder / "store", IDENTITY).open("me", "s")
    for end in range(1, len(KEPT) + 1):
        journal.write(Record(KEPT[:end], ((end, 2),), [{"role": "user", "content": "hi"}] * end))
    place = journal.place.folder.name
    files = {"journal.jsonl": "bytes", "session.json": "json", "lease": "bytes"}
    return [
        Kind("session", "stream", lambda place: stream(session, place / "stream"), ours=True),
        *(Kind("store", f"{place}/{name}", kept, form) for name, form in files.items()),
    ]


IDENTITY = {"model": "gdn4", "weights": "00"}
KEPT = [3, 1, 4, 1, 5]


def stream(session: zoo.Session, file: Path) -> Any:
    session.fork().load(file)
    leaves = torch.utils._pytree.tree_leaves(read_file(file, session._model))
    return [x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in leaves if x is not None]


def kept(folder: Path) -> None:
    """Read the journal of a session. A cut loses the lines after it, which looks like a kill; other damage loses none."""
    store = Store(folder, IDENTITY)
    store.names("me")
    tokens = store.open("me", "s").stored.tokens
    assert KEPT[: len(tokens)] == tokens, f"other tokens: {tokens}"
    lines = next(folder.glob("*/journal.jsonl")).read_bytes().count(b"\n")
    assert len(tokens) >= min(lines, len(KEPT)), f"{len(tokens)} of {len(KEPT)} tokens are left"


def runs(folder: Path) -> list[Kind]:
    """The folder of a finished run, and of one that has not finished."""
    config = tiny(steps=RUN["steps"], checkpoint_every=RUN["checkpoint_every"])
    train(config, folder / "run")
    shutil.copytree(folder / "run", folder / "begun")
    for name in ("results.json", WEIGHTS, "zoo.yaml"):
        (folder / "begun" / name).unlink()
    settings = yaml.safe_load((folder / "run" / "train.yaml").read_text())
    return [
        Kind("run", "train.yaml", prepared, "yaml"),
        Kind("run", "results.json", drawn, "json"),
        Kind("run", "metrics.jsonl", drawn, "jsonl"),
        Kind("begun", "train.yaml", lambda place: RunFolder(place, settings) and None, "yaml"),
        Kind("begun", "metrics.jsonl", lambda place: RunFolder(place, settings).trim_metrics() and None, "jsonl"),
        *(Kind("begun", f"{LAST}/{name}", partial(resumed, settings=settings), form, ours=True) for name, form in CHECKPOINT.items()),
    ]


def prepared(folder: Path) -> None:
    prepare(read_config(folder / "train.yaml"), torch.device("meta"))


def drawn(folder: Path) -> None:
    read_run(folder)


def resumed(folder: Path, settings: dict[str, Any]) -> Any:
    """Return the tensors that a run resumes from; an older checkpoint means that the damage was noticed."""
    chosen = RunFolder(folder, settings).newest_whole()
    assert chosen is not None
    if chosen.name != Path(LAST).name:
        return None
    model = zoo.load(chosen)
    return {**model.state_dict(), **RunFolder.load(chosen, model)}


def plans(folder: Path) -> list[Kind]:
    (folder / "plan").mkdir()
    plan = {"base": RUN, "grid": {"lr": [0.001, 0.002]}, "arms": {"longer": {"overrides.d_model": 32}}, "seeds": [0]}
    (folder / "plan" / "plan.yaml").write_text(yaml.safe_dump(plan))
    return [Kind("plan", "plan.yaml", planned, "yaml")]


def planned(folder: Path) -> None:
    plan = read_plan(folder / "plan.yaml")
    runs_of(plan, arms_of(plan))


def data(folder: Path) -> list[Kind]:
    """The files that tasks and `zoo tokenize` read."""
    (folder / "data").mkdir()
    rows = [{"context": f"It is {n}.", "question": "What is it?", "answer": f"{n}"} for n in range(4)]
    problem = {"problem": "There are two lions. " * 4, "question": "How many?", "op": 2, "solution": "Answer: 2."}
    talk = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user", "assistant")]
    lines = {"qa": rows, "chat": [{"messages": talk}] * 3, "gsm": [problem] * 3, "text": [{"text": f"document {n}"} for n in range(9)]}
    for split in ("train", "test"):
        np.save(folder / "data" / f"{split}.npy", np.arange(len(split), 60, dtype=np.uint16))
        for name, fields in lines.items():
            text = "".join(json.dumps(line | {"split": split}) + "\n" for line in fields)
            (folder / "data" / f"{name}-{split}.jsonl").write_text(text)
    files = {"train.npy": "npy", "qa-train.jsonl": "jsonl", "chat-train.jsonl": "jsonl", "gsm-train.jsonl": "jsonl"}
    read = [Kind("data", file, partial(batch, task=task), form) for (file, form), task in zip(files.items(), TASKS, strict=True)]
    return [*read, Kind("data", "text-train.jsonl", lambda place: list(documents([place / "text-train.jsonl"], "text")) and None, "jsonl")]


TASKS = (
    {"name": "text", "train": "train.npy", "test": "test.npy", "vocab": 60, "length": 16, "width": 8},
    {"name": "qa", "train": "qa-train.jsonl", "test": "qa-test.jsonl", "width": 32},
    {"name": "chat", "train": "chat-train.jsonl", "test": "chat-test.jsonl", "width": 32},
    {"name": "gsm-infinite", "train": "gsm-train.jsonl", "test": "gsm-test.jsonl", "shortest": 20, "longest": 400, "width": 40},
)


def batch(folder: Path, task: dict[str, Any]) -> None:
    made = new_task({**task, "train": str(folder / task["train"]), "test": str(folder / task["test"])})
    made.batch(0, 0, 4)


def make_bundle(folder: Path, source: Path) -> list[Kind]:
    """Copy a bundle into `folder`. Its model has at least 9 tokens in its vocabulary."""
    shutil.copytree(source, folder / "bundle")
    kinds = [Kind("bundle", MANIFEST, exported, "json")]
    for path in sorted((folder / "bundle").iterdir()):
        if path.suffix in (".onnx", ".bin"):
            kinds += [Kind("bundle", path.name, exported, ours=True), Kind("bundle", path.name, renewed)]
    return kinds


def exported(folder: Path) -> Any:
    return [zoo.export.load(folder).feed(torch.arange(9).view(1, -1))]


def renewed(folder: Path) -> None:
    """Open a bundle whose manifest has the checksums of its damaged files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"] = {name: digest(folder / name) for name in manifest["sha256"]}
    (folder / MANIFEST).unlink()  # it may be a hard link
    (folder / MANIFEST).write_text(json.dumps(manifest))
    exported(folder)

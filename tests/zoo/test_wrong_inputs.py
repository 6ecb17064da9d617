"""Wrong inputs at every entrance: the package's error, in one line; status 2 and no traceback on the command line."""

import math
import socket
from contextlib import closing
from typing import Literal, NamedTuple

import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import BaseModel, Field
from torch.utils._pytree import tree_map, tree_map_only

import zoo
from zoo.cli import main as zoo_main
from zoo.config import validate
from zoo.export.cli import main as export_main
from zoo.export.plan import Plan
from zoo.export.runtime import ExportedModel
from zoo.state import State
from zoo.training.config import read_config
from zoo.training.loop import train

DEVICE = "cuda:99" if torch.cuda.is_available() else "cuda"
MODEL = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 256}
TASK = {"name": "cycle", "nodes": 5, "hops": 2}
RUN = {"model": "gdn4-sleep2", "overrides": {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "window": 5}, "task": TASK, "steps": 2}
RUN |= {"batch_size": 4, "eval_sequences": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders and files to point commands at."""
    folder = tmp_path_factory.mktemp("place")
    zoo.save(zoo.create("gdn4-sleep2-hard16", **MODEL), folder / "model")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "broken.yaml").write_text("a: [")
    (folder / "plan.yaml").write_text(yaml.safe_dump({"base": RUN, "arms": {"loops": [1, 2]}}))
    for name in ("damaged", "mismatched", "newer"):
        zoo.save(zoo.create("gdn4-sleep2-hard16", **MODEL), folder / name)
    (folder / "damaged" / "model.safetensors").write_bytes(b"\xff" * 64)
    (folder / "mismatched" / "zoo.yaml").write_text(zoo.create("gdn4", **MODEL | {"d_model": 32}, device="meta").config.yaml())
    (folder / "newer" / "zoo.yaml").write_text((folder / "model" / "zoo.yaml").read_text() + "dreams: 3\n")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


COMMANDS = [
    ("list", "none*"),
    ("describe", "gdn5"),
    ("describe", "gdn4-sleep0"),
    ("describe", "gdn4", "d_model=-1"),
    ("describe", "gdn4", "d_model=abc"),
    ("describe", "gdn4", "layers=attn ("),
    ("describe", "gdn4", "layers=atn"),
    ("describe", "gdn4", "d_modle=16"),
    ("describe", "gdn4", "blocks.gdn.heads=0"),
    ("describe", "gdn4", "evict=some"),
    ("describe", "gdn4", "evict=hard"),
    ("describe", "gdn4", "window=8"),
    ("describe", "gdn4", "span=[3, 1]"),
    ("describe", "nowhere.yaml"),
    ("describe", "{place}/list.yaml"),
    ("describe", "{place}/broken.yaml"),
    ("describe", "{place}/empty"),
    ("describe", "{place}/empty", "--yaml"),
    ("describe", "{place}/file"),
    ("describe", "{new}er"),
    ("train", "cicle"),
    ("train", "nowhere.yaml"),
    ("train", "{place}/empty"),
    ("train", "{place}/list.yaml"),
    ("train", "{place}/broken.yaml"),
    ("train", "{place}/run.yaml", "--out", "{place}/file"),
    ("train", "{place}/run.yaml", "--out", "{place}/file/run"),
    ("train", "{place}/run.yaml", "--out", "{place}/loop"),
    ("train", "{place}/run.yaml", "--out", "{place}/model"),
    *(
        ("train", "{place}/run.yaml", pair, "--out", "{new}")
        for pair in (
            f"device={DEVICE}",
            "device=gpu",
            "device=meta",
            "steps=0",
            "steps=many",
            "stepz=1",
            "batch_size=0",
            "accumulate=9",
            "lr=-1",
            "lr=nan",
            "optimizer=adamm",
            "dtype=int8",
            "recompute=all",
            "parallel=tensor",
            "seed=-1",
            "task.name=cicle",
            "task.hopz=2",
            "task.hops=0",
            "model=gdn5",
            "overrides.vocab_size=2",
            "overrides.window=7",
            "weights=nowhere",
            "weights={place}/damaged",
            "weights={place}/model",
        )
    ),
    ("eval", "nowhere"),
    ("eval", "{place}/empty"),
    ("eval", "{place}/model"),
    ("eval", "{place}/file"),
    ("eval", "{place}/model", "--sequences", "0"),
    ("eval", "{place}/model", "--loops", "0"),
    ("ablate", "cicle", "--out", "{new}"),
    ("ablate", "{place}/run.yaml", "--out", "{new}"),
    ("ablate", "{place}/plan.yaml", "--out", "{place}/file"),
    ("ablate", "{place}/plan.yaml", "--out", "{place}/loop"),
    ("ablate", "{place}/plan.yaml", "--out", "{new}", "--processes", "0"),
    ("ablate", "{place}/plan.yaml", "base.model=gdn5", "--out", "{new}"),
    ("ablate", "{place}/plan.yaml", "seeds=[]", "--out", "{new}"),
    ("plot", "nowhere", "--out", "{new}.png"),
    ("plot", "{place}/empty", "--out", "{new}.png"),
    ("plot", "{place}/model", "--out", "{new}.png"),
    ("plot", "{place}/model", "--out", "{new}.txt"),
    ("plot", "{place}/model", "--out", "{place}/file/new.png"),
    ("demo", "--out", "{place}/file"),
    ("demo", "--out", "{place}/loop"),
    ("convert", "nowhere", "{new}"),
    ("convert", "{place}/empty", "{new}"),
    ("convert", "{place}/file", "{new}"),
    ("convert", "{place}/damaged", "{new}"),
    ("convert", "{place}/mismatched", "{new}"),
    ("convert", "{new}er", "{new}"),
    ("convert", "{place}/model", "{place}/file"),
    ("convert", "{place}/model", "{place}/file/new"),
    ("convert", "{place}/model", "{place}/loop"),
    ("convert", "{place}/model", "{place}/model"),
    ("convert", "{place}/model", "{new}", "--to", "hf"),
    ("convert", "{place}/model", "{new}", "--to", "onnx"),
    *(
        (command, *arguments)
        for command in ("chat", "serve")
        for arguments in (
            ("gdn5",),
            ("gdn4-sleep2",),  # no tokenizer, and a vocabulary too small for bytes
            ("nowhere.yaml",),
            ("{place}/empty",),
            ("{place}/file",),
            ("{place}/damaged",),
            ("{place}/mismatched",),
        )
    ),
    ("chat", "{place}/model", "--tokens", "0"),
    ("chat", "{place}/model", "--temperature", "-1"),
    *(("chat", "{place}/model", "--temperature", number) for number in ("nan", "inf", "1e31")),
    ("chat", "{place}/model", "--seed", str(2**63)),
    *(("tokenize", "{place}/file", "--out", "{place}/tokens", "--held-out", share) for share in ("0", "1")),
    ("chat", "{place}/model", "--top-p", "0"),
    ("chat", "{place}/model", "--seed", "-1"),
    *((command, "{place}/model", "--device", device) for command in ("chat", "serve") for device in (DEVICE, "gpu", "meta")),
    *((command, "{place}/model", "--dtype", "int8") for command in ("chat", "serve")),
    ("serve", "{place}/model", "--when", "sometimes"),
    *(
        ("serve", "{place}/model", "--when", when)
        for when in ("interval(0)", "interval(1e999)", "interval(nan)", "idle(nan)", "idle(1e300)")
    ),
    ("serve", "{place}/model", "--max-bytes", "10"),
    ("serve", "{place}/model", "--port", "70000"),
    ("serve", "{place}/model", "--port", "{port}"),
    ("serve", "{place}/model", "--host", "256.1.1.1"),
    ("serve", "{place}/model", "--slots", "0"),
    ("serve", "{place}/model", "--idle", "nan"),
    *(("serve", "{place}/model", wait, "1e300") for wait in ("--idle", "--wait", "--grace", "--client-timeout")),
    *(("doctor", "--device", device) for device in (DEVICE, "gpu", "meta")),
    ("train", "x" * 300),
    ("eval", "x" * 300),
    ("chat", "x" * 300),
    ("doctor", "now"),
    ("dream",),
]

EXPORTS = [
    ("gdn5", "--out", "{new}"),
    ("gdn4", "d_modle=1", "--out", "{new}"),
    ("{place}/empty", "--out", "{new}"),
    ("{place}/file", "--out", "{new}"),
    ("{place}/damaged", "--out", "{new}"),
    ("{place}/mismatched", "--out", "{new}"),
    ("{place}/model", "d_model=32", "--out", "{new}"),
    ("{place}/model", "--out", "{place}/file"),
    ("{place}/model", "--out", "{place}/file/new"),
    ("{place}/model", "--out", "{place}/loop"),
    ("{place}/model",),
    ("{place}/model", "--out", "{new}", "--verify-only", "{new}"),
    ("{place}/model", "--verify-only", "{place}/empty"),
    ("{place}/model", "--verify-only", "nowhere"),
    ("{place}/model", "--out", "{new}", "--target", "metal"),
    ("{place}/model", "--out", "{new}", "--dtype", "int8"),
    *(("{place}/model", "--out", "{new}", "--device", device) for device in (DEVICE, "gpu", "meta")),
    ("{place}/model", "--out", "{new}", "--dialect", "dutch"),
    ("{place}/model", "--out", "{new}", "--loops", "0"),
    ("{place}/model", "--out", "{new}", "--prefill", "-1"),
    ("{place}/model", "--out", "{new}", "--prefill", "17"),
    ("{place}/model", "--out", "{new}", "--max-length", "0"),
    ("{place}/model", "--out", "{new}", "--weights-only-int8", "--weights-only-int4"),
    ("{place}/model", "--out", "{new}", "--weights-only-int4", "--weights-only-int8"),
    ("{place}/model", "--out", "{new}", "--unroll", "--per-pass"),
    ("{place}/model", "--out", "{new}", "--batch", "1", "1", "8"),
    ("{place}/model", "--out", "{new}", "--compute-capability", "8.0"),
    ("{place}/model", "--out", "{new}", "--seed", "-1"),
]


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.setattr("uvicorn.run", lambda *arguments, **options: pytest.fail("served"))


def refused(command, arguments, place, new):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        words = [word.format(place=place, new=new, port=taken.getsockname()[1]) for word in arguments]
        result = CliRunner().invoke(command, words)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Usage:") or result.stderr.splitlines()[-1].startswith("Error: ")
    assert not new.exists()


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_zoo(place, tmp_path, arguments):
    refused(zoo_main, arguments, place, tmp_path / "new")


@pytest.mark.parametrize("arguments", EXPORTS, ids=" ".join)
def test_zoo_export(place, tmp_path, arguments):
    refused(export_main, arguments, place, tmp_path / "new")


CALLS = {
    "create: unknown name": lambda place, new, model: zoo.create("gdn5"),
    "create: unknown field": lambda place, new, model: zoo.create("gdn4", d_modle=3),
    "create: missing device": lambda place, new, model: zoo.create("gdn4", device=DEVICE),
    "create: unknown device": lambda place, new, model: zoo.create("gdn4", device="gpu"),
    "create: no checkpoint": lambda place, new, model: zoo.create("gdn4", pretrained=place / "empty"),
    "create: no published weights": lambda place, new, model: zoo.create("gdn4", pretrained=True),
    "create: another architecture": lambda place, new, model: zoo.create("gdn4", pretrained=place / "model"),
    "create: a number": lambda place, new, model: zoo.create(5),
    "create: weights in a number": lambda place, new, model: zoo.create("gdn4", pretrained=5),
    "load: a number": lambda place, new, model: zoo.load(5),
    "load: a very long name": lambda place, new, model: zoo.load("x" * 5000),
    "load: a null character": lambda place, new, model: zoo.load("a\0b"),
    "load: a lone surrogate": lambda place, new, model: zoo.load("a\ud800b"),
    "save: to nothing": lambda place, new, model: zoo.save(model, None),
    "describe: a list": lambda place, new, model: zoo.describe(["gdn4"]),
    "train: into a number": lambda place, new, model: train(read_config(place / "run.yaml"), 5),
    "train: on meta": lambda place, new, model: train(read_config(place / "run.yaml", {"device": "meta"}), new),
    "Session.save: to a number": lambda place, new, model: zoo.Session(model).save(5),
    "Session.load: from nothing": lambda place, new, model: zoo.Session(model).load(None),
    "export: into a number": lambda place, new, model: zoo.export.export(model, 5),
    "export.load: from a number": lambda place, new, model: zoo.export.load(5),
    "load: no folder": lambda place, new, model: zoo.load(place / "none"),
    "load: a file": lambda place, new, model: zoo.load(place / "file"),
    "load: an empty folder": lambda place, new, model: zoo.load(place / "empty"),
    "load: damaged": lambda place, new, model: zoo.load(place / "damaged"),
    "load: of another shape": lambda place, new, model: zoo.load(place / "mismatched"),
    "load: unknown field": lambda place, new, model: zoo.load(place / "newer"),
    "load: missing device": lambda place, new, model: zoo.load(place / "model", device=DEVICE),
    "save: a file is there": lambda place, new, model: zoo.save(model, place / "file"),
    "save: under a file": lambda place, new, model: zoo.save(model, place / "file" / "new"),
    "save: a folder that is full": lambda place, new, model: zoo.save(model, place / "model"),
    "save: a loop of links": lambda place, new, model: zoo.save(model, place / "loop"),
    "save: unknown format": lambda place, new, model: zoo.save(model, new, format="onnx"),
    "save: no upstream form": lambda place, new, model: zoo.save(model, new, format="hf"),
    "save: no weights": lambda place, new, model: zoo.save(zoo.create("gdn4", device="meta"), new),
    "describe: unknown name": lambda place, new, model: zoo.describe("gdn5"),
    "Session: unknown schedule": lambda place, new, model: zoo.Session(model, when="sometimes"),
    "Session: no stream": lambda place, new, model: zoo.Session(model, 0),
    "Session.feed: outside the vocabulary": lambda place, new, model: zoo.Session(model).feed(torch.tensor([[256]])),
    "Session.feed: negative": lambda place, new, model: zoo.Session(model).feed(torch.tensor([[-1]])),
    "Session.feed: no tokens": lambda place, new, model: zoo.Session(model).feed(torch.zeros(1, 0, dtype=torch.long)),
    "Session.feed: two streams": lambda place, new, model: zoo.Session(model).feed(torch.zeros(2, 3, dtype=torch.long)),
    "Session.sleep: no passes": lambda place, new, model: zoo.Session(model).sleep(0),
    "Session.generate: temperature": lambda place, new, model: zoo.Session(model).generate(torch.tensor([[1]]), 3, temperature=-1.0),
    "Session.generate: nothing read": lambda place, new, model: zoo.Session(model).generate(None, 3),
    "Session.load: no file": lambda place, new, model: zoo.Session(model).load(place / "none"),
    "Session.load: damaged": lambda place, new, model: zoo.Session(model).load(place / "file"),
    "Session.save: under a file": lambda place, new, model: zoo.Session(model).save(place / "file" / "new"),
    "SessionPool: no slots": lambda place, new, model: zoo.SessionPool(model, 0),
    "SessionPool: memory": lambda place, new, model: zoo.SessionPool(model, max_bytes=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_api(place, tmp_path, name):
    model = zoo.load(place / "model")
    with pytest.raises(zoo.ZooError, match=r"^[^\n]+$"):
        CALLS[name](place, tmp_path / "new", model)
    assert not list(tmp_path.iterdir())


IDS = torch.arange(4)[None]
MASK = torch.ones(1, 4)

WRONG_IDS = {
    "a list": [[1, 2, 3, 4]],
    "int32": IDS.int(),
    "float": IDS.float(),
    "bool": IDS.bool(),
    "one dimension": IDS[0],
    "three dimensions": IDS[None],
    "no rows": IDS[:0],
    "no tokens": IDS[:, :0],
    "above the vocabulary": IDS + 253,
    "negative": IDS - 1,
    "another device": IDS.to("meta"),
}
READERS = {
    "forward": lambda place, ids: place.model(ids),
    "wake": lambda place, ids: place.model.wake(ids),
    "consolidate": lambda place, ids: place.model.consolidate(ids),
    "loss": lambda place, ids: place.model.loss(ids, MASK),
    "answers": lambda place, ids: place.model.answers(ids, MASK),
    "feed": lambda place, ids: zoo.Session(place.model).feed(ids),
    "generate": lambda place, ids: zoo.Session(place.model).generate(ids, 2),
    "pool": lambda place, ids: place.pool.open().feed(ids),
    "bundle": lambda place, ids: place.bundle(ids, place.bundle.init_state()),
    "bundle.consolidate": lambda place, ids: place.bundle.consolidate(ids, place.bundle.init_state()),
}


def cast(dtype, part):
    return tree_map_only(torch.Tensor, lambda x: x.to(dtype), part)


# from the right state, and its owner
WRONG_STATES = {
    "an Output": lambda state, owner: owner(IDS, state),
    "a tuple": lambda state, owner: tuple(state),
    "of layers in another order": lambda state, owner: State(state.fast[::-1], state.window[::-1], 0),
    "of more layers": lambda state, owner: State(state.fast * 2, state.window * 2, 0),
    "of another width": lambda state, owner: state._replace(fast=tuple(s if s is None else s[..., 1:] for s in state.fast)),
    "of other attention heads": lambda state, owner: state._replace(
        window=(tree_map(lambda x: x[:, 1:], state.window[0]), state.window[1])
    ),
    "of two streams": lambda state, owner: owner.init_state(2),
    "of no stream": lambda state, owner: tree_map_only(torch.Tensor, lambda x: x[:0], state),
    "with fast weights in bfloat16": lambda state, owner: state._replace(fast=cast(torch.bfloat16, state.fast)),
    "with fast weights in float64": lambda state, owner: state._replace(fast=cast(torch.float64, state.fast)),
    "with a cache in bfloat16": lambda state, owner: state._replace(window=cast(torch.bfloat16, state.window)),
    "without fast weights": lambda state, owner: state._replace(fast=(None, None)),
    "at a position below 0": lambda state, owner: state._replace(position=-1),
    "at no position": lambda state, owner: state._replace(position=None),
    "at the positions of two streams": lambda state, owner: state._replace(position=torch.tensor([0, 0])),
    "at a position in float32": lambda state, owner: state._replace(position=torch.tensor([0.0])),
    "without a cache": lambda state, owner: state._replace(window=(None, None)),
}
AFTER = {
    "forward": lambda place, state: place.model(IDS, state),
    "wake": lambda place, state: place.model.wake(IDS, state),
    "consolidate": lambda place, state: place.model.consolidate(IDS, state),
    "bundle": lambda place, state: place.bundle(IDS, state),
    "bundle.consolidate": lambda place, state: place.bundle.consolidate(IDS, state),
}

COUNTERS = {
    "init_state batch_size": lambda place, n: place.model.init_state(n),
    "consolidate loops": lambda place, n: place.model.consolidate(IDS, loops=n),
    "answers loops": lambda place, n: place.model.answers(IDS, MASK, loops=n),
    "answers backward_chunks": lambda place, n: place.model.answers(IDS, MASK, backward_chunks=n),
    "Session batch_size": lambda place, n: zoo.Session(place.model, n),
    "sleep loops": lambda place, n: zoo.Session(place.model).sleep(n),
    "generate tokens": lambda place, n: zoo.Session(place.model).generate(IDS, n),
    "generate top_k": lambda place, n: zoo.Session(place.model).generate(IDS, 1, top_k=n),
    "SessionPool slots": lambda place, n: zoo.SessionPool(place.model, n),
    "SessionPool streams": lambda place, n: zoo.SessionPool(place.model, streams=n),
    "SessionPool context": lambda place, n: zoo.SessionPool(place.model, context=n),
    "SessionPool max_bytes": lambda place, n: zoo.SessionPool(place.model, max_bytes=n),
    "bundle loops": lambda place, n: place.bundle.consolidate(IDS, place.bundle.init_state(), loops=n),
    "bundle batch_size": lambda place, n: place.bundle.init_state(n),
}

ARGUMENTS = [
    ("recompute", lambda model: model.answers(IDS, MASK, recompute="all")),
    ("recompute", lambda model: model.answers(IDS, MASK, recompute=True)),
    ("recompute", lambda model: model.wake(IDS, recompute="passes")),
    ("recompute", lambda model: model.consolidate(IDS, recompute="passes")),
    ("loss_mask", lambda model: model.loss(IDS, MASK.tolist())),
    ("loss_mask", lambda model: model.loss(IDS, MASK.to("meta"))),
    ("loss_mask", lambda model: model.loss(IDS, MASK[:, 1:])),
    ("loss_mask", lambda model: model.loss(IDS, MASK[0])),
    ("loss_mask", lambda model: model.loss(IDS, MASK * 2)),
    ("loss_mask", lambda model: model.loss(IDS, MASK * float("nan"))),
    ("loss_mask", lambda model: model.loss(IDS, MASK * 0)),
    ("awake", lambda model: model.consolidate(IDS, awake=model.wake(IDS[:, :2]))),
    ("awake", lambda model: model.consolidate(IDS, awake=3)),
    ("state", lambda model: model.consolidate(IDS, awake=(model.wake(IDS)[0], model.init_state(2)))),
    ("snapshot", lambda model: zoo.Session(model).restore(model.init_state())),
    ("state", lambda model: zoo.Session(model).restore(zoo.Session(small(d_model=16)).snapshot())),
    ("state", lambda model: zoo.Session(model).restore(zoo.Session(small(layers="gdn")).snapshot())),
    ("seed", lambda model: zoo.create("gdn4", seed="a")),
    ("seed", lambda model: zoo.create("gdn4", seed=2**64)),
    ("cu_seqlens", lambda model: model(IDS, cu_seqlens=[0, 4])),
    ("cu_seqlens", lambda model: model(IDS, cu_seqlens=torch.tensor([0.0, 4.0]))),
    ("cu_seqlens", lambda model: model(IDS, cu_seqlens=torch.tensor([0]))),
    ("cu_seqlens", lambda model: model(IDS, cu_seqlens=torch.tensor([0, 5]))),
    ("cu_seqlens", lambda model: model(IDS, cu_seqlens=torch.tensor([1, 4]))),
    ("cu_seqlens", lambda model: model(IDS, cu_seqlens=torch.tensor([0, 2, 1, 4]))),
    ("cu_seqlens", lambda model: model.consolidate(IDS, cu_seqlens=torch.tensor([0, 5]))),
    ("cu_seqlens", lambda model: model.consolidate(IDS, cu_seqlens=[0, 4])),
    ("cu_seqlens", lambda model: model(IDS.expand(2, 4), cu_seqlens=torch.tensor([0, 4]))),
    ("state", lambda model: model(IDS, model(IDS).state, cu_seqlens=torch.tensor([0, 2, 4]))),
    ("model", lambda model: zoo.Session("gdn4")),
    ("model", lambda model: zoo.Session(torch.nn.Linear(2, 2))),
    ("model", lambda model: zoo.Session(small(device="meta"))),
    ("model", lambda model: zoo.SessionPool(None)),
    ("schedule", lambda model: zoo.Session(model, when=3)),
    ("schedule", lambda model: zoo.SessionPool(model, when=None)),
    ("wait", lambda model: zoo.Session(model).sleep(wait="no")),
    ("generate: stop", lambda model: zoo.Session(model).generate(IDS, 1, stop=3)),
    ("generate: stop", lambda model: zoo.Session(model).generate(IDS, 1, stop="a")),
    ("generate: temperature", lambda model: zoo.Session(model).generate(IDS, 1, temperature=float("nan"))),
    ("generate: top_p", lambda model: zoo.Session(model).generate(IDS, 1, top_p=0)),
    ("generate: seed", lambda model: zoo.Session(model).generate(IDS, 1, seed=-1)),
    ("generate: repetition_penalty", lambda model: zoo.Session(model).generate(IDS, 1, repetition_penalty=0)),
    ("dtype", lambda model: zoo.create("gdn4", dtype="int8")),
    ("dtype", lambda model: zoo.create("gdn4", dtype=torch.int64)),
]


def small(**fields):
    return zoo.create("gdn4-sleep2-hard16", **MODEL | fields)


class Entrances(NamedTuple):
    """The objects that the tables call."""

    model: zoo.Model
    pool: zoo.SessionPool
    bundle: ExportedModel


@pytest.fixture(scope="module")
def entrances(tmp_path_factory):
    blocks = {"attn": {"heads": 2}, "gdn": {"heads": 2}}  # as in the bundles of tests/export, which trace the same blocks
    model, folder = zoo.create("gdn4-sleep2-hard6", **MODEL, blocks=blocks), tmp_path_factory.mktemp("bundle") / "bundle"
    zoo.export.export(model, folder, plan=Plan(prefill=None), verified=False)
    with zoo.SessionPool(model, 1, streams=20) as pool:
        yield Entrances(model, pool, ExportedModel(folder))


def names(field, call):
    """Check that `call` raises a ZooError of one line that begins with `field`."""
    with pytest.raises(zoo.ZooError, match=rf"^{field}\b[^\n]+$"):
        call()


@pytest.mark.parametrize("kind", WRONG_IDS)
@pytest.mark.parametrize("entrance", READERS)
def test_ids(entrances, entrance, kind):
    names("(ids|loss_mask: cpu)", lambda: READERS[entrance](entrances, WRONG_IDS[kind]))


@pytest.mark.parametrize("kind", WRONG_STATES)
@pytest.mark.parametrize("entrance", AFTER)
def test_states(entrances, entrance, kind):
    owner = entrances.bundle if "bundle" in entrance else entrances.model
    state = WRONG_STATES[kind](owner.init_state(), owner)
    names("state", lambda: AFTER[entrance](entrances, state))


def test_a_model_and_its_bundle_refuse_the_states_of_each_other(entrances):
    names("state", lambda: entrances.model(IDS, entrances.bundle.init_state()))
    names("state", lambda: entrances.bundle(IDS, entrances.model.init_state()))


@pytest.mark.parametrize("value", [0, -1, 2.5, "two"])
@pytest.mark.parametrize("counter", COUNTERS)
def test_counts(entrances, counter, value):
    entrance, field = counter.split()
    names(f"{entrance}: {field}" if entrance == "generate" else field, lambda: COUNTERS[counter](entrances, value))


@pytest.mark.parametrize(("field", "call"), ARGUMENTS, ids=[f"{field}-{i}" for i, (field, _) in enumerate(ARGUMENTS)])
def test_arguments(entrances, field, call):
    names(field, lambda: call(entrances.model))


def test_the_tables_begin_from_calls_that_are_right(entrances):
    for call in READERS.values():
        call(entrances, IDS)
    for name, call in AFTER.items():
        call(entrances, (entrances.bundle if "bundle" in name else entrances.model).init_state())
    for counter, call in COUNTERS.items():
        made = call(entrances, 10**9 if "max_bytes" in counter else 2)
        if isinstance(made, zoo.SessionPool):
            made.close()


class Form(BaseModel):
    count: int = Field(3, ge=1, lt=9)
    rate: float = Field(0.5, gt=0, le=1, allow_inf_nan=False)
    kind: Literal["a", "b"] = "a"
    flag: bool = True
    name: str = ""
    each: tuple[int, ...] = Field((1,), min_length=1, max_length=2)
    more: dict[str, int] = {}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"count": "many"}, "count: 'many': want an integer"),
        ({"count": 1.5}, "count: 1.5: want an integer"),
        ({"count": None}, "count: None: want an integer"),
        ({"count": 0}, "count: 0: must be greater than or equal to 1"),
        ({"count": 9}, "count: 9: must be less than 9"),
        ({"rate": []}, "rate: []: want a number"),
        ({"rate": 0}, "rate: 0: must be greater than 0"),
        ({"rate": 2}, "rate: 2: must be less than or equal to 1"),
        ({"rate": math.nan}, "rate: nan: want a finite number"),
        ({"kind": "c"}, "kind: 'c': allowed: 'a', 'b'"),
        ({"flag": "perhaps"}, "flag: 'perhaps': want true or false"),
        ({"name": 3}, "name: 3: want text"),
        ({"each": 3}, "each: 3: want a list"),
        ({"each": [1, "x"]}, "each.1: 'x': want an integer"),
        ({"each": []}, "each: []: want at least 1 entry"),
        ({"each": [1, 2, 3]}, "each: [1, 2, 3]: want at most 2 entries"),
        ({"more": 1}, "more: 1: want a mapping of fields"),
        ({"name": ["x" * 10**6] * 100}, "name: ['xxxxxxxxxxxx...xxxxxxxxxxxxx', "),
    ],
)
def test_fields(fields, problem):
    with pytest.raises(zoo.ZooError) as refused:
        validate(Form, fields, "form")
    assert str(refused.value).startswith(f"form: {problem}")
    assert len(str(refused.value)) < 300


def test_an_error_is_one_line_of_bounded_length():
    assert str(zoo.ZooError("a\nb")) == "a b"
    assert len(str(zoo.ZooError("x" * 10**6))) < 2100

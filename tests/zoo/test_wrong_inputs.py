"""Wrong inputs at every entrance: the package's error, in one line; status 2 and no traceback on the command line."""

import socket
from contextlib import closing

import pytest
import torch
import yaml
from click.testing import CliRunner

import zoo
from zoo.cli import main as zoo_main
from zoo.export.cli import main as export_main

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
    ("chat", "{place}/model", "--temperature", "nan"),
    ("chat", "{place}/model", "--top-p", "0"),
    ("chat", "{place}/model", "--seed", "-1"),
    ("serve", "{place}/model", "--when", "sometimes"),
    ("serve", "{place}/model", "--when", "interval(0)"),
    ("serve", "{place}/model", "--max-bytes", "10"),
    ("serve", "{place}/model", "--port", "70000"),
    ("serve", "{place}/model", "--port", "{port}"),
    ("serve", "{place}/model", "--host", "256.1.1.1"),
    ("serve", "{place}/model", "--slots", "0"),
    ("serve", "{place}/model", "--idle", "nan"),
    ("doctor", "--device", "cuda"),
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
    ("{place}/model", "--out", "{new}", "--dialect", "dutch"),
    ("{place}/model", "--out", "{new}", "--loops", "0"),
    ("{place}/model", "--out", "{new}", "--prefill", "0"),
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

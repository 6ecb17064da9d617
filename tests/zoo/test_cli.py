"""The commands, run in this process: their output and their errors."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.filesize import decimal
from safetensors.torch import load_file

import zoo
from zoo.cli import SECTIONS, main


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


SMALL = {
    "model": "gdn4-sleep2",
    "overrides": {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "window": 5},
    "task": {"name": "cycle", "nodes": 5, "hops": 2},
    "steps": 3,
    "batch_size": 4,
    "eval_sequences": 8,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_list():
    assert run("list", "gdn*").output.split() == zoo.list_models("gdn*")
    facets = ("--sleeps", "--family", "granitemoehybrid", "--mixer", "attn", "--params", "..1b")
    assert run("list", *facets).output.split() == ["granite4-h-350m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing*"], "no model matches 'nothing*'; allowed: "),
        (["lfm2*", "--sleeps"], "no model matches 'lfm2*' with these options; without them: lfm2-1.2b, "),
        (["--family", "llama"], "no model matches '*' with these options; without them: "),
        (["--family", "bambi"], "family: 'bambi' is unknown; did you mean 'bamba'? allowed: bamba, "),
        (["--mixer", "gnd"], "mixer: 'gnd' is unknown; did you mean 'gdn'? allowed: attn, "),
        (["--params", "3b"], "params: '3b'; want a range such as 1b..3b, 3b.. or ..500m"),
    ],
)
def test_list_nothing(arguments, message):
    output = run("list", *arguments, status=2).output
    assert output.startswith(f"Error: {message}")
    assert output.count("\n") == 1


def test_describe_prints_a_table_or_yaml(tmp_path):
    assert "3.70 M (14.1 MiB)" in run("describe", "gdn4-sleep4").output
    path = tmp_path / "mine.yaml"
    path.write_text(run("describe", "gdn4-sleep4", "d_model=32", "blocks.gdn.heads=2", "--yaml").output)
    assert run("describe", path).output == run("describe", "gdn4-sleep4", "d_model=32", "blocks.gdn.heads=2").output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_describe_a_folder(tmp_path, dtype):
    """A saved model, and an upstream checkpoint with and without weights: as the model describes itself."""
    saved = zoo.create("gdn4-sleep2", d_model=32, dtype=dtype)
    zoo.save(saved, tmp_path / "saved")
    assert run("describe", tmp_path / "saved").output == f"{zoo.describe(saved)}\n"
    assert run("describe", tmp_path / "saved", "--yaml").output == saved.config.yaml()
    assert run("describe", tmp_path / "saved", "loops=3").output == f"{zoo.describe(saved, loops=3)}\n"
    oracle = Path(__file__).parents[1] / "data" / "oracles" / "jet-nemotron-a"
    assert run("describe", oracle).output == f"{zoo.describe(zoo.load(oracle))}\n"
    bare = tmp_path / oracle.name
    bare.mkdir()
    shutil.copy(oracle / "config.json", bare)
    assert "397 K (1.52 MiB)" in run("describe", bare).output
    assert "no zoo.yaml and no upstream config.json" in run("describe", tmp_path, status=2).stderr


def test_describe_a_run_before_and_after_its_end(tmp_path, config, monkeypatch):
    monkeypatch.setattr("zoo.training.loop.deferred", lambda: nullcontext(lambda: signal.SIGTERM))
    run("train", config, "log_every=1", "--out", tmp_path / "run", status=143)
    before = run("describe", tmp_path / "run").output
    monkeypatch.undo()
    run("train", tmp_path / "run")
    assert run("describe", tmp_path / "run").output == before == f"{zoo.describe(zoo.load(tmp_path / 'run'))}\n"


def test_help_shows_every_command_in_a_section():
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(main.commands)
    lines = run("--help").output.splitlines()
    assert all(any(line.startswith(f"  {name} ") and "..." not in line for line in lines) for name in main.commands)


def test_train_then_eval(tmp_path, config):
    run("train", config, "steps=4", "log_every=2", "--out", tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "model.safetensors",
        "results.json",
        "tensorboard",
        "train.yaml",
        "zoo.yaml",
    ]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    output = run("eval", tmp_path / "run", "--sequences", 8, "--loops", 3).output
    assert "hops" in output
    assert "best guess" in output


def test_an_interrupted_run_resumes(tmp_path, config, monkeypatch):
    monkeypatch.setattr("zoo.training.loop.deferred", lambda: nullcontext(lambda: signal.SIGTERM))
    assert "stopped after step 1 of 3" in run("train", config, "log_every=1", "--out", tmp_path / "run", status=143).stderr
    monkeypatch.undo()
    assert "holds a run with lr: 0.003, not 0.1" in run("train", config, "log_every=1", "lr=.1", "--out", tmp_path / "run", status=2).stderr
    for wrong, field in {"task.hosp=2": "hosp", "overrides.d_modl=8": "d_modl"}.items():
        refused = run("train", config, "log_every=1", wrong, "--out", tmp_path / "run", status=2)
        assert f"{field}: unknown field" in refused.stderr
    unfinished = run("chat", tmp_path / "run", status=2).stderr
    assert f"a training run without a final model; its newest checkpoint is {tmp_path / 'run' / 'checkpoints' / '00000001'}" in unfinished
    assert f"{tmp_path / 'run'}: resumes after step 1 of 3\n" in run("train", tmp_path / "run").stdout
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert "finished" in run("train", tmp_path / "run", status=2).stderr


def test_warnings_take_one_line(tmp_path):
    row = {"context": "a" * 70, "question": "x", "answer": "y"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    zoo.save(zoo.create("gdn4-sleep2-hard32", d_model=16, vocab_size=256), tmp_path / "model")
    (tmp_path / "run.yaml").write_text(f"""model: {tmp_path}/model
task: {{name: qa, width: 32, windows: 2, train: asked.jsonl, test: other.jsonl}}
steps: 1
batch_size: 1
""")
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    lines = subprocess.run(
        [sys.executable, "-m", "zoo", "train", "run.yaml", "--out", "run"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stderr.splitlines()
    for name in ("asked", "other"):
        assert f"Warning: {tmp_path}/{name}.jsonl: 1 of 1 context cut at the beginning: more than 64 tokens" in lines


def test_convert_round_trip(tmp_path):
    oracle = Path(__file__).parents[1] / "data" / "oracles" / "jet-nemotron-a"
    run("convert", oracle, tmp_path / "ours")
    run("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "hf")
    before, after = load_file(oracle / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "already exists" in run("convert", oracle, tmp_path / "ours", status=2).stderr
    assert "no zoo.yaml and no upstream config.json" in run("convert", tmp_path, tmp_path / "new", status=2).stderr


def test_chat_sleeps_between_turns(tmp_path):
    model = zoo.create("gdn4-sleep2-hard64", layers="attn gdn", d_model=16, d_ff=16, vocab_size=256)
    zoo.save(model, tmp_path / "model")
    arguments = ["chat", str(tmp_path / "model"), "--tokens", "5", "--temperature", "0"]
    result = CliRunner().invoke(main, arguments, input="hi\n\nand then?\n")  # an empty line is not a turn
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert f"0/64 tokens in the window, 0 sleeps, state {decimal(zoo.describe(model).state_bytes)}" in result.output
    assert len(re.findall(r" sleeps?, state ", result.output)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "jett*"], "no model matches 'jett*'"),
        (["describe", "gdn5"], "unknown model 'gdn5'; did you mean 'gdn4'"),
        (["describe", "gdn4", "d_model"], "want field=value"),
        (["describe", "gdn4-sleep0"], "loops: 0"),
        (["train", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["train", "cicle"], "unknown run 'cicle'; did you mean 'cycle'?"),
        (["train", "runs/cicle"], "runs/cicle: no such file or folder; want a YAML file"),
        (["train", "."], ".: holds no run; want a YAML file"),
        (["train", "{config}", "stepz=4"], "stepz: unknown field; did you mean 'steps'"),
        (["train", "{config}", "model=gdn4-slep4"], "unknown suffix '-slep4'"),
        (["train", "{config}", "--out", "{config}"], "already exists"),
        (["eval", "nowhere"], "nowhere"),
        (["eval", "nowhere", "--loops", "4", "loops=3"], "--loops: 4; loops=3 sets it too; want one of them"),
        (["demo", "--out", "{config}"], "already exists"),
        (["chat", "gdn4-sleep2"], "vocab_size: 3; text in bytes needs 256"),
        (["serve", "gdn5"], "unknown model 'gdn5'"),
        (["serve", "gdn5", "--store", ""], "store: ''; want a folder, or the URL of an object store"),
        (["serve", "gdn5", "--store", "/dev/null/sessions"], "store: /dev/null/sessions: Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(config, arguments, message):
    before = config.read_text()
    result = run(*(a.format(config=config) for a in arguments), status=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")
    assert config.read_text() == before


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("zoo.cli", ["--help"]),
        ("zoo.cli", ["list", "--family", "bamba", "--mixer", "mamba2"]),
        ("zoo.cli", ["train", "--help"]),
        ("zoo.export.cli", ["--help"]),
    ],
)
def test_names_and_help_do_not_import_torch(module, arguments):
    code = f"import sys; from {module} import main; main({arguments}, standalone_mode=False); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_no_module_hides_a_public_name():
    """`import zoo.x` sets the attribute x of zoo, so a module must not have the name of a public function."""
    code = """
import importlib, pkgutil, types, zoo
public = {name: getattr(zoo, name) for name in zoo.__all__}
for module in pkgutil.iter_modules(zoo.__path__):
    importlib.import_module(f"zoo.{module.name}")
for name, item in public.items():
    assert getattr(zoo, name) is item and isinstance(item, types.ModuleType) == (name in ("export", "kernels")), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_hub_name_is_evaluated_like_a_folder():
    result = CliRunner().invoke(main, ["eval", "hf://alone"])
    assert result.exit_code != 0
    assert "FOLDER: 'hf://alone': want hf://OWNER/NAME or hf://OWNER/NAME@REVISION" in result.output + str(result.exception)


def test_an_error_of_the_system_is_one_line(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    monkeypatch.setattr("zoo.costs.describe", full)
    assert run("describe", "gdn4", status=2).stderr == "Error: /data/x: No space left on device\n"


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path):
    (tmp_path / "\u65e5.yaml").write_text("name: \u65e5\nlayers: gdn\nd_model: 16\nvocab_size: 3\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "describe", str(tmp_path / "\u65e5.yaml")], env=environment, capture_output=True, check=True
    )
    assert b"\\u65e5" in done.stdout

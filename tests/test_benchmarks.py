"""The CPU benchmarks: what is timed, what counts as right, and what a table says. Toy contenders; nothing here compares times."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import zoo
from benchmarks import __main__ as driver
from benchmarks import drift, kernels
from benchmarks.measure import cells, compare, console
from benchmarks.server_sleep import compared

ROOT = Path(__file__).parents[1]


def python(code, *arguments, **options):
    """Return what a new process at the top of this tree prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


@pytest.mark.parametrize("package", ["ours", "transformers"])
def test_a_load_is_measured_without_imports(tmp_path, package):
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    code = """
import sys
from benchmarks import loading
measured, seen = loading.peak_memory, []
loading.peak_memory = lambda: seen.append(set(sys.modules)) or measured()
loading.load(*sys.argv[1:])
before, after = seen
print(*sorted(after - before))
"""
    result, imported = python(code, package, tmp_path).splitlines()
    assert json.loads(result).keys() == {"seconds", "bytes", "sum"}
    assert imported == ""


LLAMA = """
import ctypes, sys
from unittest.mock import MagicMock
sys.modules["llama_cpp"] = MagicMock(
    llama_decode=lambda context, batch: 0,
    llama_vocab_n_tokens=lambda vocabulary: 4,
    llama_get_logits_ith=lambda context, end: (ctypes.c_float * 4)(),
)
"""


def test_the_process_of_llama_imports_neither_torch_nor_this_library(tmp_path):
    pytest.importorskip("transformers")
    from benchmarks.opening import THEIRS

    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){THEIRS}print(*sys.modules)"
    imported = {name.partition(".")[0] for name in python(code, "file.gguf", 1).split()}
    assert {"llama_cpp", "numpy"} <= imported
    assert not imported & {"torch", "zoo", "transformers"}


def test_another_contender_never_takes_the_place_of_ours():
    row = compare("a case", {"N = 2": int, "N = 4": int}, ours="N = 1", rounds=1)
    assert row["times"].keys() == {"N = 2", "N = 4"}
    assert row["ratios"] == {}
    assert [line[2:6:2] for line in cells(row)] == [["", "not measured"]] * 2
    row = compare("a case", {"N = 2": int, "N = 1": int}, ours="N = 1", rounds=1)
    assert row["ratios"].keys() == {"N = 2"}
    ((_, name, *_, ours, theirs, _),) = cells(row | {"times": {"N = 2": [2, 2, 2], "N = 1": [1, 1, 1]}})
    assert (name, ours, theirs) == ("N = 2", "1 ms", "2 ms")


def test_a_wait_that_occurs_on_one_side_only_is_not_compared():
    found = {1: {"between tokens": [0.001]}, 4: {"between tokens": [0.002], "first token after a cancelled sleep": [0.004]}}
    lines = [line[1:6] for row in compared("2 clients", found) for line in cells(row) if "p99" not in row["case"]]
    assert lines == [
        ["N = 4", "2.00 (2.00 to 2.00)", "", "1 ms", "2 ms"],
        ["N = 4", "", "", "did not occur", "4 ms"],
    ]
    (row, _) = compared("2 clients", {1: {"between tokens": [0.001]}, 4: {}})
    assert [line[1:6] for line in cells(row)] == [["N = 4", "did not occur", "", "1 ms", ""]]


@pytest.fixture
def operator(monkeypatch):
    """Measure y = a + b, with the final state a, in a form of ours and in one of a peer."""

    def right(x):
        return x["a"] + x["b"], x["a"] * 1.0

    def measured(ours=right, theirs=right):
        monkeypatch.setattr(kernels, "ours", lambda operator, form: right if form == "reference" else ours)
        inputs = {name: torch.ones(2, 3) for name in "ab"}
        return kernels.measure("sum", inputs, "sum", {"peer": theirs}, 1)

    return measured


class Wrong(torch.autograd.Function):
    """y, with a gradient that is NaN."""

    @staticmethod
    def forward(ctx, y):
        return y * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def wrong(x):
    return x["a"] + Wrong.apply(x["b"]), x["a"] * 1.0


def test_a_form_whose_gradient_is_nan_is_wrong_and_not_timed(operator):
    for row in operator(theirs=wrong):
        assert row["problems"] == {"peer": "wrong by nan"}
        assert row["times"].keys() == {"ours"}
        assert math.isnan(row["errors"]["peer"])


def test_a_row_whose_own_form_is_wrong_says_so_and_shows_no_ratio(operator):
    for row in operator(ours=lambda x: (1.5 * (x["a"] + x["b"]), x["a"] * 1.0)):
        ((_, name, ratio, _, ours, theirs, _),) = cells(row)
        assert (name, ratio, ours) == ("peer", "", "wrong by 5e-01")
        assert theirs == f"{row['times']['peer'][1]:.4g} ms"
    (row, _) = operator()
    assert row["ratios"].keys() == {"peer"}


def test_a_drift_that_is_nan_is_shown_as_the_largest(monkeypatch):
    assert math.isnan(drift.summary("hard", 0.5, {"stream": [0.1, math.nan, 0.2]})["stream"]["most"])
    monkeypatch.setattr(drift, "WINDOW", 1)
    sizes = {"layers": "attn gdn", "d_model": 8, "d_ff": 8, "vocab_size": 4, "blocks": {"attn": {"heads": 1}, "gdn": {"heads": 1}}}
    model = zoo.create("gdn4-sleep1-hard1", **sizes)
    with torch.no_grad():
        model.embed.weight[3] = math.nan
    ids = torch.zeros(1, 100, dtype=torch.long)
    ids[:, -1] = 3
    with console.capture() as shown:
        drift.drift(model, ids)
    assert shown.get().count("nan") == 3


def test_a_missing_genai_is_a_row_that_says_so(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from benchmarks.genai import genai

    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    row = compare("a token", {"ours": int, "onnxruntime-genai": genai(tmp_path, torch.zeros(1, 2))}, rounds=1)
    assert cells(row)[0][1:3] == ["onnxruntime-genai", "not installed"]


TOY = """
import json, os, sys
from pathlib import Path
reader, writer = map(int, os.environ["ZOO_BENCHMARK_TURNS"].split())
os.read(reader, 1)
for _ in range(2):
    os.write(writer, b".")
    os.read(reader, 1)
file = Path(os.environ["ZOO_BENCHMARK_RESULTS"], Path(sys.argv[0]).stem + ".jsonl")
file.parent.mkdir(parents=True, exist_ok=True)
rows = [{"case": "a", "unit": "ms", "times": {"ours": [8, 8, 8]}, "taken": [2.0, 2.0]}]
rows += [{"case": "b", "unit": "ms", "times": {"peer": [1, 1, 1]}}]
file.write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


@pytest.fixture
def revisions(tmp_path, monkeypatch):
    """A repository whose first revision has no benchmark `sleep`, and in which `prefill` fails; `decode` works everywhere."""

    def git(*arguments):
        identity = "-c", "user.name=toy", "-c", "user.email=toy"
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "measure.py").write_text("")
    (folder / "decode.py").write_text(TOY)
    (folder / "prefill.py").write_text("import os\nos.read(int(os.environ['ZOO_BENCHMARK_TURNS'].split()[0]), 1)\nraise SystemExit(3)\n")
    git("init", "--quiet")
    for added in ("prefill.py", "sleep.py"):
        git("add", ".")
        git("commit", "--quiet", "--message", "a revision")
        (folder / added).write_text(TOY)
    monkeypatch.setattr(driver, "HERE", folder)


def test_two_revisions_take_turns(revisions):
    result = CliRunner().invoke(driver.main, ["decode", "--against", "HEAD~1"])
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in result.output.splitlines() if "\u2502" in line]
    assert lines == [["a", "1.00 (1.00 to 1.00)", "2000 ms", "2000 ms"]]


def test_a_revision_that_lacks_a_benchmark_or_fails_is_named(revisions):
    result = CliRunner().invoke(driver.main, ["sleep", "prefill", "decode", "--against", "HEAD~1"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-2:] == ["sleep: HEAD~1 has no such benchmark", "prefill: HEAD~1 ended with status 3"]
    assert "2000 ms" in result.output


def test_a_process_that_ends_before_its_first_turn_is_an_exit_status(tmp_path, monkeypatch):
    def start(*arguments):
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(4)"])
        process.wait()
        return process

    monkeypatch.setattr(driver, "start", start)
    assert driver.in_turns("decode", {tmp_path / "now": tmp_path, tmp_path / "then": tmp_path}) == [4, 4]

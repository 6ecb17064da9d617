"""`zoo doctor`: its output, and that it detects a wrong operator."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo import doctor
from zoo.kernels import tuning
from zoo.kernels.common.examples import example
from zoo.kernels.dispatch import kernels

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ROW = {
    "kernel": "ssd.states",
    "arch": 90,
    "dtype": "bfloat16",
    "shape": {"N": 64, "P": 64},
    "config": {"BP": 32, "num_warps": 4},
    "compiled": None,
    "hardware": None,
}


def test_every_operator_is_checked() -> None:
    findings = list(doctor.self_check(CPU))
    folders = {file.parent.name for file in (ROOT / "kernels").glob("*/reference.py")}
    assert len(folders) > 8
    assert {finding.operator for finding in findings} == folders
    assert [finding for finding in findings if not finding.right] == []


def test_a_wrong_form_and_a_failing_one_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernels.get("ssd.chunked")

    def wrong(*inputs):
        y, final = run(*inputs)
        return y * (1 + 1e-3), final

    def failing(*inputs):
        raise RuntimeError("out of shared memory\nand more")

    for broken, words in ((wrong, ""), (failing, "RuntimeError: out of shared memory")):
        monkeypatch.setattr(kernels, "get", lambda name, get=kernels.get, broken=broken: broken if name == "ssd.chunked" else get(name))
        finding = doctor.check("ssd", CPU, torch.float32, {}, "chunked")
        assert not finding.right
        assert finding.problem == words
        monkeypatch.undo()


def test_results_and_gradients_that_are_nan_or_missing_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernels.get("ssd.chunked")

    def error(form):
        monkeypatch.setattr(kernels, "get", lambda name, get=kernels.get: form if name == "ssd.chunked" else get(name))
        finding = doctor.check("ssd", CPU, torch.float32, {"T": 5}, "chunked")
        monkeypatch.undo()
        assert not finding.right
        return finding.error

    def nan_at_the_end(*inputs):
        y, final = run(*inputs)
        return y, final * math.nan

    def without_a_gradient(x, dt, *inputs):
        return run(x, dt.detach(), *inputs)

    assert math.isnan(error(nan_at_the_end))
    assert error(without_a_gradient) == math.inf


def test_a_gradient_that_neither_side_has_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = example("ssd", T=5)
    inputs["unused"] = torch.ones(1, requires_grad=True)
    call = doctor.call
    monkeypatch.setattr(doctor, "call", lambda operator, given, form: call(operator, {n: given[n] for n in given if n != "unused"}, form))
    assert doctor.deviation("ssd", inputs, "chunked") <= 1e-4


def test_the_gpu_is_named_whatever_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.versions(CPU)["GPU"] == "none that torch can use" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Toy GPU {device and device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert doctor.versions(CPU)["GPU"] == "Toy GPU None, compute capability 9.0"
    assert doctor.versions(torch.device("cuda", 1))["GPU"] == "Toy GPU 1, compute capability 9.0"


def test_verdicts_decide_which_configuration_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is used only once it is verified, by a stamp for this GPU and Triton or by the doctor."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toy GPU")
    monkeypatch.setattr(tuning, "table", lambda: [ROW])
    tuning.verdicts.cache_clear()
    assert not tuning.proven(ROW, "Toy GPU")
    doctor.remember([doctor.Finding("ssd", "x", 0.5, 0.03, row=ROW), doctor.Finding("ssd", "plain", 0.0, 0.03)], CPU)
    tuning.verdicts.cache_clear()
    assert not tuning.proven(ROW, "Toy GPU")
    doctor.remember([doctor.Finding("ssd", "x", 0.01, 0.03, row=ROW)], CPU)
    tuning.verdicts.cache_clear()
    assert tuning.proven(ROW, "Toy GPU")
    assert not tuning.proven(ROW, "Other GPU")
    assert list(json.loads(tuning.verdicts_path("Toy GPU").read_text())) == [tuning.row_name(ROW)]
    stamped = ROW | {"hardware": {"device": "Other GPU", "triton": tuning.version("triton")}}
    assert tuning.proven(stamped, "Other GPU")
    assert not tuning.proven(stamped | {"hardware": {"device": "Other GPU", "triton": "3.0"}}, "Other GPU")
    tuning.verdicts.cache_clear()


def test_the_command_without_a_gpu_and_without_triton() -> None:
    """Without Triton, import, the doctor and the PyTorch forms work; forcing Triton is a one-line error."""
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, zoo, zoo.doctor
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.common.examples import example
inputs = example("gated_delta_rule", T=5, K=4, V=4)
gated_delta_rule(**inputs)
try:
    gated_delta_rule(**inputs, form="triton")
except zoo.ZooError as error:
    print(error)
from zoo.cli import main
main(["doctor", "--no-check"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (
        "form 'triton' cannot run: triton is not installed (pip install 'sleep-zoo[triton]'); allowed here: chunked, reference"
        in result.stdout
    )
    assert "gated_delta_rule" in result.stdout
    assert torch.__version__ in result.stdout

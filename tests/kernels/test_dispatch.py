"""The form of an operator that serves a call, and where operators come from."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import catalogue
import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.kernels import dispatch
from zoo.kernels.common.examples import example
from zoo.kernels.dispatch import choose, kernels, operators, replaced
from zoo.kernels.ssd.op import ssd

CPU = torch.zeros(1)


def test_the_callers_choice_beats_use_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("ssd", CPU, "chunked") is kernels.get("ssd.chunked")
    monkeypatch.setenv("ZOO_KERNELS", "reference")
    assert choose("ssd", CPU, "chunked") is kernels.get("ssd.reference")
    with zoo.kernels.use("chunked"):
        assert choose("ssd", CPU, "reference") is kernels.get("ssd.chunked")
        assert choose("ssd", CPU, "chunked", form="reference") is kernels.get("ssd.reference")
    assert choose("ssd", CPU, "chunked") is kernels.get("ssd.reference")


def test_functions_replace_the_operators_they_are_given_for_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "reference")
    with replaced({"ssd": max}), ThreadPoolExecutor(1) as other:
        assert choose("ssd", CPU, "chunked") is max
        assert other.submit(choose, "ssd", CPU, "chunked").result() is kernels.get("ssd.reference")
        assert choose("ssd", CPU, "chunked", form="reference") is kernels.get("ssd.reference")
        assert choose("selective_scan", CPU, "chunked") is kernels.get("selective_scan.chunked")
    assert choose("selective_scan", CPU, "chunked") is kernels.get("selective_scan.reference")


def test_unknown_forms_name_where_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match=r"use: unknown kernel form 'chunk'; did you mean 'chunked'\?"):
        zoo.kernels.use("chunk")
    with pytest.raises(ZooError, match=r"ssd: form: unknown kernel form .cuda.;.* allowed: chunked"):
        choose("ssd", CPU, "chunked", form="cuda")
    monkeypatch.setenv("ZOO_KERNELS", "cuda")
    with pytest.raises(ZooError, match="ZOO_KERNELS: unknown kernel form 'cuda'"):
        choose("ssd", CPU, "chunked")


@pytest.mark.parametrize(("batch", "T"), [(0, 3), (1, 0)])
@pytest.mark.parametrize("operator", ["causal_conv1d", "dynamic_conv1d", "gated_delta_rule", "kda", "selective_scan", "ssd"])
def test_no_tokens_are_refused(operator: str, batch: int, T: int) -> None:
    with pytest.raises(ValueError, match=rf"inputs \[{batch}, {T}, \.\.\.\]: want at least one row and one token"):
        operators.get(operator)(**example(operator, batch=batch, T=T))


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_forms", lambda operator=None: {"chunked", "reference", "triton"})
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    with pytest.raises(ZooError, match=r"ssd: form 'triton' cannot run: the tensors are on cpu .* allowed here: chunked, reference"):
        choose("ssd", CPU, "chunked", form="triton")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(ZooError, match=r"triton is not installed \(pip install 'sleep-zoo\[triton\]'\)"):
        choose("ssd", CPU, "chunked", form="triton")


def test_the_choice_and_its_reason_are_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, "zoo.kernels"):
        for _ in range(2):
            choose("ssd", CPU, "chunked")
        choose("ssd", CPU, "chunked", form="reference")
    assert caplog.messages == ["ssd: chunked (the tensors are on cpu)", "ssd: reference (the caller's choice)"]


def test_the_first_call_may_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call looks up operators and other packages; those imports cannot be traced."""
    monkeypatch.setattr(kernels, "_points", None)
    x, dt, A, B = torch.randn(1, 3, 2, 4), torch.rand(1, 3, 2), -torch.rand(2), torch.randn(1, 3, 1, 5)
    traced = torch.compile(ssd, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x, dt, A, B, B)[0], ssd(x, dt, A, B, B)[0])


PLUG_IN = {
    "double/op.py": """
from zoo.kernels.dispatch import choose, kernels

def double(x, *, form=None):
    return choose("double", x, "reference", form)(x)

kernels.register("double.reference", lambda x: 2 * x)
""",
    "double/example.py": """
WIDE = ()

def inputs(random, batch, T, *, N=3):
    return {"x": random(batch, T, N)}
""",
    "double-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: double\nVersion: 1\n",
    "double-1.dist-info/entry_points.txt": "[zoo_operators]\ndouble = double.op:double\n",
}


def test_an_operator_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "double" not in operators.names()  # registers ours
    for name, text in PLUG_IN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(operators, "_points", None)
    monkeypatch.setattr(catalogue, "REGISTRY", catalogue.REGISTRY.copy())  # other tests do not see the operator
    assert {"double", "ssd"} <= set(operators.names())
    inputs = example("double", T=5, dtype=torch.bfloat16)
    assert torch.equal(operators.get("double")(**inputs, form="reference"), 2 * inputs["x"])
    assert "double.reference" in kernels.names()
    with pytest.raises(ZooError, match="unknown operator 'dubble'; did you mean 'double'"):
        operators.get("dubble")

"""The precision of float32 products: chosen by measurement, recorded in a run, restored afterwards, never set on import."""

import json
import os
import signal

import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from tests.zoo.training.tiny import tiny
from zoo import products
from zoo.cli import main
from zoo.signals import StoppedError
from zoo.training.loop import train


@pytest.fixture(autouse=True)
def unchanged():
    assert torch.get_float32_matmul_precision() == "highest"
    yield
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("faster", "exact", "expected"), [(0.0, 1.0, "medium"), (0.0, 0.0, "highest"), (1e9, 1.0, "highest")])
def test_medium_must_be_faster_and_exact(faster, exact, expected, monkeypatch):
    monkeypatch.setattr(products, "FASTER", faster)
    monkeypatch.setattr(products, "SAVED", -1.0)
    monkeypatch.setattr(products, "EXACT", exact)
    assert zoo.matmul_precision(64) == expected


def test_medium_must_save_time(monkeypatch):
    monkeypatch.setattr(products, "FASTER", 0.0)
    monkeypatch.setattr(products, "SAVED", 1e9)
    assert zoo.matmul_precision(64) == "highest"


def test_a_run_measures_the_rows_of_its_batches(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("zoo.training.loop.matmul_precision", lambda width, rows: seen.append((width, rows)) or "highest")
    config = tiny(batch_size=6, accumulate=2, steps=1)
    train(config, tmp_path / "run", measure_products=True)
    model = zoo.create(config.model, device="meta", **config.overrides).config
    assert seen == [(model.d_model, 3 * model.window)]


def test_medium_that_rounds_is_refused(monkeypatch):
    """As on a CPU that multiplies bfloat16 under "medium"."""
    linear = torch.nn.functional.linear

    def rounding(x, weight):
        medium = torch.get_float32_matmul_precision() == "medium"
        return linear(x.bfloat16(), weight.bfloat16()).float() if medium else linear(x, weight)

    monkeypatch.setattr(products, "FASTER", 0.0)
    monkeypatch.setattr(products, "SAVED", -1.0)
    monkeypatch.setattr(products.F, "linear", rounding)
    assert zoo.matmul_precision(64) == "highest"


def test_a_setting_of_the_process_stays():
    with products.set_precision("high"):
        assert zoo.matmul_precision() == "high"


@pytest.mark.parametrize("given", [{"width": 0}, {"width": "512"}, {"rows": None}, {"rows": 1.0}])
def test_sizes_that_are_not_counts_are_refused(given):
    with pytest.raises(zoo.ZooError, match=f"{next(iter(given))}: .*at least 1"):
        zoo.matmul_precision(**given)


def measured(precision, monkeypatch):
    monkeypatch.setattr("zoo.products.matmul_precision", lambda width, rows: precision)
    monkeypatch.setattr("zoo.training.loop.matmul_precision", lambda width, rows: precision)


def recorded(run):
    return [json.loads(file.read_text())["matmul_precision"] for file in sorted(run.glob("checkpoints/*/progress.json"))]


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch, capsys):
    config, seen = tiny(steps=3, checkpoint_every=1, log_every=1, eval_sequences=8), []

    def stop(metrics):
        seen.append(torch.get_float32_matmul_precision())
        os.kill(os.getpid(), signal.SIGTERM)

    measured("medium", monkeypatch)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", report=stop, measure_products=True)
    assert "float32 matmul precision: medium" in capsys.readouterr().err
    measured("highest", monkeypatch)
    train(config, tmp_path / "run", report=lambda _: seen.append(torch.get_float32_matmul_precision()), measure_products=True)
    assert seen == ["medium"] * 3
    assert set(recorded(tmp_path / "run")) == {"medium"}


def test_a_run_without_a_measurement_keeps_that_of_the_process(tmp_path, monkeypatch):
    measured("medium", monkeypatch)
    config = tiny(steps=1, eval_sequences=8)
    train(config, tmp_path / "plain")
    with products.set_precision("high"):
        train(config, tmp_path / "high")
    assert (recorded(tmp_path / "plain"), recorded(tmp_path / "high")) == (["highest"], ["high"])


def test_commands_measure(tmp_path, monkeypatch):
    """`zoo train`, `eval` and `chat` run their products under what was measured. `zoo serve` shares the code of `chat`."""
    seen, layouts = [], []
    one_pass = zoo.Model._pass

    def watched(model, *args):
        seen.append(torch.get_float32_matmul_precision())
        layouts.append(model.head.weight.is_contiguous())
        return one_pass(model, *args)

    monkeypatch.setattr(zoo.Model, "_pass", watched)
    monkeypatch.setattr(products, "by_columns_is_faster", lambda: True)
    monkeypatch.chdir(tmp_path)
    measured("medium", monkeypatch)
    zoo.save(zoo.create("gdn4", layers="gdn", d_model=16, d_ff=16, vocab_size=256), "model")
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny(steps=1, eval_sequences=8).model_dump(mode="json")))
    for arguments in (["train", "tiny.yaml", "--out", "run"], ["eval", "run", "--sequences", "8"], ["chat", "model", "--tokens", "1"]):
        seen.clear()
        result = CliRunner().invoke(main, arguments, input="hi\n")
        assert result.exit_code == 0, result.output
        assert set(seen) == {"medium"}, arguments
    assert not layouts[-1]  # of chat, and of no other command
    assert layouts[0]


def in_float64(x, weight, bias, upstream):
    y = torch.addmm(bias.double(), x.double(), weight.double().t())
    return y, upstream.double() @ weight.double(), upstream.double().t() @ x.double()


class Multiplied(TorchDispatchMode):
    """Records the dtypes of the matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in products.MATRIX_PRODUCTS:
            self.dtypes.append(args[0].dtype)
        return operator(*args, **(kwargs or {}))


def test_bfloat16_is_multiplied_in_float32_and_rounded_once():
    """The output and both gradients of a linear layer, and batched products, are those of float64 to half a unit of bfloat16."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(96, 64).bfloat16(), torch.randn(32, 64).bfloat16(), torch.randn(32).bfloat16()
    upstream, linear = torch.randn(96, 32).bfloat16(), torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    x.requires_grad_()
    dtypes = []
    linear.register_forward_hook(lambda module, args, y: dtypes.append(y.dtype))
    with Multiplied() as multiplied, products.Float32Products():
        y = linear(x)
        y.backward(upstream)
        batched = torch.bmm(x.detach().view(4, 24, 64), weight.view(4, 8, 64).transpose(1, 2))
    exact = in_float64(x.detach(), weight, bias, upstream)
    for ours, wanted in zip((y, x.grad, linear.weight.grad), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ((ours.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-4).all()
    wanted = x.detach().double().view(4, 24, 64) @ weight.double().view(4, 8, 64).transpose(1, 2)
    assert ((batched.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-4).all()
    assert dtypes == [torch.bfloat16]
    assert multiplied.dtypes == [torch.float32] * 4


@pytest.mark.parametrize(("faster", "expected"), [(0.0, "float32"), (1e9, "bfloat16")])
def test_bfloat16_products_are_measured(faster, expected, monkeypatch):
    monkeypatch.setattr(products, "FASTER", faster)
    assert products.bfloat16_products() == expected


def test_a_run_keeps_the_products_that_it_began_with(tmp_path, monkeypatch):
    """A run that resumes where the measurement says otherwise ends as one that was not interrupted."""
    config, used = tiny(steps=3, checkpoint_every=1, eval_sequences=8, dtype="bfloat16", lr=1e-2), []
    monkeypatch.setattr("zoo.training.loop.set_products", lambda *chosen: used.append(chosen[1]) or products.set_products(*chosen))
    monkeypatch.setattr("zoo.training.loop.bfloat16_products", lambda: "float32")
    train(config, tmp_path / "whole", measure_products=True)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", report=lambda _: os.kill(os.getpid(), signal.SIGTERM), measure_products=True)
    monkeypatch.setattr("zoo.training.loop.bfloat16_products", lambda: "bfloat16")
    train(config, tmp_path / "run", measure_products=True)
    train(config, tmp_path / "plain", measure_products=True)
    assert used == ["float32", "float32", "float32", "bfloat16"]
    whole, resumed = (zoo.load(tmp_path / name).state_dict() for name in ("whole", "run"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())

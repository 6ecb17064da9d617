"""Linear layers of a few rows: those of float64, whatever the number of rows; and how they are compiled."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.kernels.linear import op

SHAPES = [(512, 1536), (37, 50), (16, 3), (5, 5), (64, 7), (100, 1), (1, 4), (1536, 512)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 19, 31, 32, 33, 100]


@pytest.fixture(autouse=True, scope="module")
def built():
    op.build()


def inputs(n, K, N):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, K, generator=generator), torch.randn(N, K, generator=generator)


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_products_are_those_of_float64(K, N):
    for n in ROWS:
        x, weight = inputs(n, K, N)
        exact = x.double() @ weight.double().T
        largest = x.abs().double() @ weight.abs().double().T  # rounding is relative to the sum of magnitudes
        assert ((torch.ops.zoo.linear(x, weight) - exact).abs() <= 1e-6 * largest + 1e-12).all(), n


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_a_row_does_not_depend_on_the_others(K, N):
    x, weight = inputs(32, K, N)
    alone = torch.cat([torch.ops.zoo.linear(row[None], weight) for row in x])
    for n in ROWS[:-2]:
        assert torch.equal(torch.ops.zoo.linear(x[:n], weight), alone[:n])


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.bfloat16(), w.bfloat16()),
        lambda x, w: (x, w.T.contiguous().T),
        lambda x, w: (x[:0], w),
        lambda x, w: (x[:, ::2], w[:, ::2]),
        lambda x, w: (x[:, ::2], w[:, ::2].contiguous()),
    ],
)
def test_other_dtypes_and_layouts(change):
    x, weight = change(*inputs(4, 64, 32))
    torch.testing.assert_close(torch.ops.zoo.linear(x, weight), F.linear(x, weight))


def test_widths_that_do_not_match_are_refused():
    with pytest.raises(RuntimeError, match="shapes"):
        torch.ops.zoo.linear(torch.ones(2, 3), torch.ones(4, 5))


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_layers_in_place_of_those_of_torch(bias):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128, bias=bias), nn.SiLU(), nn.Linear(128, 32, bias=bias)), torch.randn(3, 1, 64)
    want = model(x)
    with op.FewRows(), calls() as eager:
        torch.testing.assert_close(model(x), want)
    compiled = torch.compile(model, backend=op.few_rows)
    torch.testing.assert_close(compiled(x), want)
    with calls() as later:
        torch.testing.assert_close(compiled(x), want)
    assert eager == later == ["zoo::linear"] * 2


@torch.no_grad()
def test_weights_of_another_kind_are_left_to_torch():
    class Quantised(torch.Tensor):
        pass

    x, weight = inputs(2, 64, 8)
    with op.FewRows(), calls() as made:
        torch.testing.assert_close(F.linear(x, weight.as_subclass(Quantised)).as_subclass(torch.Tensor), x @ weight.T)
        F.linear(x.double(), weight.double())
    assert not made


class calls:
    """Names of our operators that were called."""

    def __enter__(self):
        self.names, self.profile = [], torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()
        return self.names

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        self.names += [event.name for event in self.profile.events() if event.name == "zoo::linear"]


def build_in(folder, compiler):
    """Build in a new process. Returns the last line that it prints."""
    code = "from zoo.kernels.linear.op import build\nbuild()\nprint('built')"
    variables = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "CXX": str(compiler)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_the_library_is_compiled_once(tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho once >> {log}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert [build_in(tmp_path / "cache", compiler) for _ in range(2)] == ["built"] * 2
    assert log.read_text() == "once\n"
    assert [file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [".so"]


@pytest.mark.parametrize(
    ("script", "error"),
    [("exit 1", "exit code 1"), ("echo cannot read flags >&2; exit 2", "cannot read flags"), (None, "No such file or directory")],
)
def test_a_compiler_that_fails_is_named(tmp_path, script, error):
    compiler = tmp_path / "compiler"
    if script:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    assert build_in(tmp_path / "cache", compiler) == f"RuntimeError: {compiler}: {error}"
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]

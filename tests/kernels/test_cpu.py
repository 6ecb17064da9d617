"""C++ kernels for one token: the results of float64 for all shapes; and how they are compiled."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.kernels.cpu.attend import attend
from zoo.kernels.cpu.backend import with_kernels
from zoo.kernels.cpu.build import build
from zoo.kernels.cpu.linear import FewRows
from zoo.kernels.cpu.step import STEPS
from zoo.kernels.dispatch import kernels

SHAPES = [(512, 1536), (37, 50), (16, 3), (5, 5), (64, 7), (100, 1), (1, 4), (1536, 512)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 19, 31, 32, 33, 100]


@pytest.fixture(autouse=True, scope="module")
def built():
    build()


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
    with FewRows(), calls() as eager:
        torch.testing.assert_close(model(x), want)
    compiled = torch.compile(model, backend=with_kernels)
    torch.testing.assert_close(compiled(x), want)
    with calls() as later:
        torch.testing.assert_close(compiled(x), want)
    assert eager == later == ["zoo::linear"] * 2


@torch.no_grad()
def test_weights_of_another_kind_are_left_to_torch():
    class Quantised(torch.Tensor):
        pass

    x, weight = inputs(2, 64, 8)
    with FewRows(), calls() as made:
        torch.testing.assert_close(F.linear(x, weight.as_subclass(Quantised)).as_subclass(torch.Tensor), x @ weight.T)
        F.linear(x.double(), weight.double())
    assert not made


def recurrence(n, H, K, V, G, by_channel=False):
    """Inputs of one token: state, q, k, v, decay, beta."""
    generator = torch.Generator().manual_seed(H)
    state, v = torch.randn(n, H, K, V, generator=generator), torch.randn(n, H, V, generator=generator)
    q, k = torch.randn(2, n, G, K, generator=generator)
    decay = torch.rand(n, H, K, generator=generator) if by_channel else torch.rand(n, H, generator=generator)
    return state, q, k / k.norm(dim=-1, keepdim=True), v, decay, 2 * torch.rand(n, H, generator=generator)


def definition(state, q, k, v, decay, beta, scale):
    repeats = state.shape[1] // q.shape[1]
    state, q, k, v, decay = (x.double() for x in (state, q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1), v, decay))
    state = state * decay.reshape(*decay.shape, *[1] * (4 - decay.ndim))
    if beta is not None:
        v = beta.double()[..., None] * (v - torch.einsum("nhkv,nhk->nhv", state, k))
    state = state + torch.einsum("nhk,nhv->nhkv", k, v)
    return scale * torch.einsum("nhkv,nhk->nhv", state, q), state


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 16, 64, 4), (1, 2, 128, 128, 1), (3, 6, 5, 7, 2), (2, 2, 33, 80, 2), (16, 4, 64, 64, 2), (1, 1, 1, 1, 1), (2, 2, 4, 81, 1)],
)
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_a_step_is_that_of_float64(shape, by_channel, delta):
    state, q, k, v, decay, beta = recurrence(*shape, by_channel)
    beta = beta if delta else None
    want, final = definition(state, q, k, v, decay, beta, 0.5)
    o = torch.ops.zoo.step_(state, q, k, v, decay, beta, 0.5)
    torch.testing.assert_close(o.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.double(), final, atol=1e-5, rtol=1e-5)


def test_a_step_of_strided_inputs():
    state, q, k, v, decay, beta = recurrence(2, 4, 16, 32, 2)
    want, final = definition(state, q, k, v, decay, beta, 1.0)
    wide = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    views = [x.unflatten(1, (-1, width)) for x, width in zip(wide.split([32, 32, 128], dim=1), (16, 16, 32), strict=True)]
    turned = [view.mT.contiguous().mT for view in views]
    for inputs in (views, turned):
        after = state.clone()
        o = torch.ops.zoo.step_(after, *inputs, decay.T.contiguous().T, beta.T.contiguous().T, 1.0)
        torch.testing.assert_close(o.double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after.double(), final, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", range(6))
def test_a_step_refuses_other_shapes(changed):
    inputs = list(recurrence(2, 4, 16, 32, 2))
    inputs[changed] = inputs[changed].mT if changed == 0 else inputs[changed][:1]
    with pytest.raises(RuntimeError, match="want"):
        torch.ops.zoo.step_(*inputs, 1.0)


@pytest.mark.parametrize("operator", sorted(STEPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2])
def test_forms_in_place_compute_the_definition(operator, dtype, tokens):
    """In place where they can; the definition itself for several tokens and in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, heads, 16, generator=generator, dtype=dtype) for heads in (2, 2, 2))
    rates = torch.rand(2, tokens, 2, generator=generator, dtype=dtype)
    state = torch.randn(2, 2, 16, 16, generator=generator, dtype=dtype)
    decays = -q.abs() if operator == "kda" else -rates
    inputs = (v, rates, -rates[0, 0], k, q) if operator == "ssd" else (q, k, v, decays, rates, 0.5)
    want = kernels.get(f"{operator}.reference")(*inputs, state.clone(), None)
    found = STEPS[operator](*inputs, state, None)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert (found[1] is state) == (dtype == torch.float32 and tokens == 1)


def attention(n, H, G, S, D, V, visible=0.7):
    """Inputs of one token: q, k, v and the visible slots, at least one of each stream."""
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(n, *shape, generator=generator) for shape in ((H, D), (G, S, D), (G, S, V)))
    seen = torch.rand(n, S, generator=generator) < visible
    seen[:, S // 2] = True
    return 3 * q, k, v, seen


ATTENTION = [(1, 8, 4, 300, 64, 64), (3, 4, 4, 7, 16, 16), (2, 6, 2, 129, 20, 37), (16, 3, 1, 64, 128, 128), (2, 2, 2, 1, 5, 3)]


@pytest.mark.parametrize("shape", [*ATTENTION, (1, 4, 2, 1000, 80, 96)])
@pytest.mark.parametrize("visible", [0.1, 1.0])
def test_attention_is_that_of_float64(shape, visible):
    q, k, v, seen = attention(*shape, visible)
    exact = F.scaled_dot_product_attention(q[:, :, None].double(), k.double(), v.double(), seen[:, None, None], enable_gqa=True, scale=0.3)
    found = torch.ops.zoo.attend(q, k, v, seen, 0.3)
    torch.testing.assert_close(found.double(), exact[:, :, 0], atol=1e-5, rtol=1e-5)
    y = attend(q[:, :, None], k, v, seen[:, None, None])
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q[:, :, None], k, v, seen[:, None, None], enable_gqa=True))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scores_of_any_size(scale):
    """The exponential neither overflows nor loses the small weights; scores further than 87 below the largest count for nothing."""
    q, k, v, seen = attention(2, 4, 2, 100, 16, 16)
    exact = F.scaled_dot_product_attention(
        q[:, :, None].double(), k.double(), v.double(), seen[:, None, None], enable_gqa=True, scale=scale
    )
    torch.testing.assert_close(
        torch.ops.zoo.attend(q, k, v, seen, scale).double(), exact[:, :, 0], atol=1e-3 if scale > 1 else 1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("S", [1, 15, 16, 64, 70, 150])
def test_a_stream_depends_neither_on_others_nor_on_hidden_slots(S):
    q, k, v, seen = attention(4, 4, 2, 200, 20, 24)
    seen[:, S:] = False
    seen[:, 0] = True
    alone = [torch.ops.zoo.attend(*(x[i : i + 1] for x in (q, k[:, :, :S], v[:, :, :S], seen[:, :S])), 0.5) for i in range(4)]
    assert torch.equal(torch.ops.zoo.attend(q, k, v, seen, 0.5), torch.cat(alone))


def test_attention_of_strided_inputs():
    q, k, v, seen = attention(2, 4, 2, 40, 16, 16)
    want = torch.ops.zoo.attend(q, k, v, seen, 0.5)
    views = (q.mT.contiguous().mT, k.mT.contiguous().mT, v.transpose(1, 2).contiguous().transpose(1, 2), seen.T.contiguous().T)
    assert not any(view.is_contiguous() for view in views)
    assert torch.equal(torch.ops.zoo.attend(*views, 0.5), want)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, seen: (q[:1], k, v, seen),
        lambda q, k, v, seen: (q[:, :3], k, v, seen),
        lambda q, k, v, seen: (q, k[..., :8], v, seen),
        lambda q, k, v, seen: (q, k, v[:, :, :8], seen),
        lambda q, k, v, seen: (q, k, v, seen[:, :8]),
        lambda q, k, v, seen: (q, k, v, seen.float()),
        lambda q, k, v, seen: (q.double(), k.double(), v.double(), seen),
    ],
)
def test_attention_refuses_other_shapes(change):
    with pytest.raises(RuntimeError, match=r"want|do not fit"):
        torch.ops.zoo.attend(*change(*attention(2, 4, 2, 40, 16, 16)), 1.0)


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
    code = "from zoo.kernels.cpu.build import build\nbuild()\nprint('built')"
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


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_code_for_narrower_vectors(tmp_path, capability):
    """Every machine that has wider vectors compiles, runs and checks the code of the others, too."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = inherited | {"ATEN_CPU_CAPABILITY": capability, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "float64 or any_size or depend", __file__]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


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

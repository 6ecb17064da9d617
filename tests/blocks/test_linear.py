"""A single row times weights that are stored by columns: the same numbers, and only where nothing else depends on the product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.blocks import linear as module
from zoo.blocks.linear import ColumnLinear, linear, one_row


@pytest.fixture
def rows(monkeypatch):
    """Shapes of the weights that single rows were multiplied with."""
    made = []
    monkeypatch.setattr(module, "one_row", lambda x, weight: made.append(tuple(weight.shape)) or one_row(x, weight))
    return made


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def by_columns(N, K, seed=0):
    weight = torch.randn(K, N, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(weight.t())


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 128, 256, 257, 700, 4096])
@pytest.mark.parametrize("N", [1, 7, 256, 1000])
def test_products_are_those_of_float64_whatever_the_threads(N, K, threads):
    weight, x = by_columns(N, K), torch.randn(1, 1, K, generator=torch.Generator().manual_seed(1))
    found = []
    for count in (1, 2, 8):
        threads(count)
        found.append(one_row(x, weight))
    exact = F.linear(x.double(), weight.double())
    assert (found[0] - exact).abs().max() < 1e-6 * max(1, exact.abs().max())
    assert found[0].shape == (1, 1, N)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_idle_threads_share_the_outputs():
    assert [module._parts(512, threads) for threads in (0, 1, 2, 3, 4, 16)] == [1, 1, 2, 2, 4, 4]
    assert [module._parts(768, 16), module._parts(500, 16), module._parts(11008, 16)] == [4, 2, 16]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(512,), (1, 512), (1, 1, 512)])
def test_a_single_row_is_summed(shape, rows):
    layer = ColumnLinear(512, 64)
    layer.weight.data = layer.weight.data.t().contiguous().t()
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-4, rtol=1e-5)
    with torch.inference_mode():
        layer(x)
    assert rows == [(64, 512)] * 2


class Wrapped(torch.Tensor):
    pass


def in_autocast(x, weight):
    with torch.autocast("cpu", torch.bfloat16):
        return linear(x, weight)


def layer(weight):
    made = ColumnLinear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = weight
    return made


def counted(x, weight):
    with FlopCounterMode(display=False) as counter:
        y = linear(x, weight)
    assert counter.get_total_flops() == 2 * weight.numel()
    return y


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "case",
    [
        lambda x, weight: linear(x.expand(2, -1), weight)[:1],
        lambda x, weight: linear(x, nn.Parameter(weight.contiguous())),
        lambda x, weight: linear(x, weight.data),  # a tensor computed from weights, such as those of an adapter
        lambda x, weight: linear(x.double(), nn.Parameter(weight.double())).float(),
        lambda x, weight: linear(x.bfloat16(), nn.Parameter(weight.bfloat16())).float(),
        lambda x, weight: linear(x.as_subclass(Wrapped), weight).as_subclass(torch.Tensor),
        lambda x, weight: in_autocast(x, weight).float(),
        lambda x, weight: torch.jit.trace(layer(weight), x, check_trace=False)(x.expand(3, -1))[:1],
        lambda x, weight: counted(x, weight),
        lambda x, weight: torch.func.vmap(lambda row: linear(row, weight))(x),
        lambda x, weight: torch.compile(linear, backend="eager", fullgraph=True)(x, weight),
    ],
)
def test_everything_else_is_left_to_torch(case, rows):
    weight, x = by_columns(64, 512), torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(case(x, weight), F.linear(x, weight), atol=0.5, rtol=0.02)
    assert not rows


def test_small_weights_and_gradients_are_left_to_torch(rows):
    weight, x = by_columns(64, 512), torch.randn(1, 512)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.expand(64, -1))
    with torch.no_grad():
        linear(x[:, :127], by_columns(128, 127))
        assert not rows
        linear(x[:, :128], by_columns(128, 128))
    assert rows == [(128, 128)]


@torch.no_grad()
def test_a_weight_that_another_thread_rearranges_is_read_once(monkeypatch):
    weight, x = by_columns(64, 512), torch.randn(1, 512)
    wanted = F.linear(x, weight)

    def rearranging(x, values):
        weight.data = weight.data.contiguous()
        return one_row(x, values)

    monkeypatch.setattr(module, "one_row", rearranging)
    torch.testing.assert_close(linear(x, weight), wanted, atol=1e-4, rtol=1e-5)
    assert weight.is_contiguous()


@torch.no_grad()
def test_an_exported_layer_takes_any_rows(rows):
    layer = ColumnLinear(512, 64, bias=False)
    layer.weight.data = layer.weight.data.t().contiguous().t()
    x = torch.randn(1, 512)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), F.linear(x, layer.weight), atol=1e-4, rtol=1e-5)
    assert not rows

"""The way a hand-written forward and backward pair reaches autograd, torch.compile and torch.export."""

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels.fused import Fused

calls: list[str] = []


def allocate(x: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1]), torch.empty_like(x)


def forward(outputs: tuple[Tensor, ...], x: "Tensor", y: "Tensor | None", scale: "float") -> None:
    """z = scale x y and its row sums; keeps scale y."""
    calls.append("forward")
    z, total, kept = outputs
    kept.copy_(scale * (torch.ones_like(x) if y is None else y))
    torch.mul(x, kept, out=z)
    torch.sum(z, -1, out=total)


def backward(grads, outputs, x: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    calls.append("backward")
    dz, dtotal = grads
    whole = torch.zeros_like(x) if dz is None else dz
    if dtotal is not None:
        whole = whole + dtotal[..., None]
    return whole * outputs[2], whole * x * scale


toy = Fused("toy_product", allocate=allocate, forward=forward, backward=backward, results=2, differentiable=("x", "y"))


def inputs(present: bool) -> tuple:
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return x, y if present else None, 1.5


def plain(x: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    z = x * scale if y is None else x * y * scale
    return z, z.sum(-1)


@pytest.mark.parametrize("present", [True, False], ids=["both", "absent"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["first", "second", "all"])
def test_results_and_gradients(present: bool, traced: bool, used: tuple[int, ...]) -> None:
    values = inputs(present)
    leaves = [value for value in values if isinstance(value, Tensor)]
    run = torch.compile(lambda *v: toy(*v), fullgraph=True, backend="aot_eager") if traced else toy
    calls.clear()
    got, want = run(*values), plain(*values)
    torch.testing.assert_close(got, want)
    loss = [sum(results[i].square().sum() for i in used) for results in (got, want)]
    torch.testing.assert_close(*(torch.autograd.grad(total, leaves) for total in loss))
    assert calls == ["forward", "backward"]


def test_the_library_operator_is_sound() -> None:
    torch.library.opcheck(toy.op, inputs(True))
    torch.library.opcheck(toy.op, inputs(False))


def test_it_is_one_node_of_an_exported_graph() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return toy(x, y, 2.0)[1]

    batch = torch.export.Dim("batch", min=2)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    program = torch.export.export(Module(), (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    assert sum("toy_product" in str(node.target) for node in program.graph.nodes) == 1
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(program.module()(x, y), (2 * x * y).sum(-1))


def test_derivatives_that_it_lacks_are_refused() -> None:
    x, y, scale = inputs(True)
    z, _ = toy(x, y, scale)
    with pytest.raises(ZooError, match=r"^toy_product: the Triton form does not support second derivatives; use the PyTorch forms"):
        torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(ZooError, match=r"^toy_product: the Triton form does not support torch.func and forward-mode AD; use"):
        torch.func.grad(lambda x: toy(x, None, scale)[0].sum())(x.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ZooError, match="forward-mode AD"):
        toy(x, y, scale)

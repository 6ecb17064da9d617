"""The backend of torch.compile for blocks that decode a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from zoo.kernels.cpu.attend import attend
from zoo.kernels.cpu.linear import linear, plain


def with_kernels(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph without gradients, with `linear` in place of `F.linear`, and `attend` where one query attends to a masked cache."""
    from torch._dynamo import lookup_backend  # slow to import

    for node in graph.graph.nodes:
        if node.target is F.linear and all(plain(_example(operand)) for operand in node.args):
            node.target = linear
        elif node.target is F.scaled_dot_product_attention and len(node.args) == 4 and _is_token(*map(_example, node.args)):
            node.target = attend
    return lookup_backend("inductor")(graph, inputs)


def _example(operand: Node | None) -> Tensor | None:
    return operand and operand.meta["example_value"]  # type: ignore[return-value]


def _is_token(q: Any, k: Any, v: Any, visible: Tensor | None) -> bool:
    return all(map(plain, (q, k, v))) and q.shape[2] == 1 and visible is not None and visible.ndim == 4

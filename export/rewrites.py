"""Rewrites of traced graphs to fewer operators, since a runtime needs a microsecond or more for each, at every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase, rewrite


class _Rotation(RewriteRuleClassBase):
    """`zoo.blocks.attention.rotate` of whole heads x [B, H, 1, D] by angles [B, 1, 1, D/2]."""

    def pattern(self, op: Any, x: Any, sizes: Any, cos: Any, sin: Any) -> Any:
        a, b = op.Split(x, sizes, axis=3, _outputs=2)
        return op.Concat(op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin)), axis=-1)

    def rewrite(self, op: Any, x: ir.Value, sizes: ir.Value, cos: ir.Value, sin: ir.Value) -> Any:
        assert x.shape is not None
        batch, heads, _, width = x.shape

        def shaped(value: ir.Value, *shape: int | ir.SymbolicDim) -> ir.Value:
            value.type, value.shape = x.type, ir.Shape(shape)
            return value

        # operators for [B, T, H D], as projections and attention have it: `skip_reshapes` cancels the transpositions
        moved = shaped(op.Transpose(x, perm=[0, 2, 1, 3]), batch, 1, heads, width)
        tokens = shaped(op.Reshape(moved, op.Constant(value_ints=[0, 0, heads * width])), batch, 1, heads * width)
        angles = [op.Squeeze(table, op.Constant(value_ints=[1])) for table in (cos, sin)]
        rotated = shaped(op.RotaryEmbedding(tokens, *angles, num_heads=heads), batch, 1, heads * width)
        split = shaped(op.Reshape(rotated, op.Constant(value_ints=[0, 0, heads, width])), batch, 1, heads, width)
        return op.Transpose(split, perm=[0, 2, 1, 3])


class _Softplus(RewriteRuleClassBase):
    """`F.softplus`, which returns x where x exceeds a threshold: there, the operator's result is x rounded to float32, too."""

    def pattern(self, op: Any, x: Any, threshold: Any) -> Any:
        return op.Where(op.Greater(x, threshold), x, op.Softplus(x))

    def check(self, context: Any, x: ir.Value, threshold: ir.Value) -> bool:  # type: ignore[override]
        at = ir.convenience.get_const_tensor(threshold)
        return x.dtype == ir.DataType.FLOAT and at is not None and bool((at.numpy() >= 20).all())

    def rewrite(self, op: Any, x: ir.Value, threshold: ir.Value) -> Any:
        return op.Softplus(x)


class _UnitNorm(RewriteRuleClassBase):
    """A norm without a weight, for which as many ones as x has numbers are made at every token."""

    def pattern(self, op: Any, x: Any, shape: Any, eps: Any) -> Any:
        return op.RMSNormalization(x, op.ConstantOfShape(shape, _outputs=["ones"]), axis=-1, epsilon=eps)

    def check(self, context: Any, x: ir.Value, shape: ir.Value, eps: Any, ones: ir.Value) -> bool:  # type: ignore[override]
        node = ones.producer()
        filled = None if node is None else node.attributes.get("value")
        known = x.shape is not None and isinstance(x.shape[-1], int) and x.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        return known and filled is not None and bool((filled.as_tensor().numpy() == 1).all())

    def rewrite(self, op: Any, x: ir.Value, shape: ir.Value, eps: Any, ones: ir.Value) -> Any:
        assert x.shape is not None
        assert x.dtype is not None
        width: Any = x.shape[-1]
        weight = op.Constant(value=ir.tensor(np.ones(width, x.dtype.numpy())))
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps.as_float())


class _UnitLength(RewriteRuleClassBase):
    """`l2norm`, x / sqrt(sum(x^2) + eps), as an RMS norm whose weight and eps make up for the mean."""

    def pattern(self, op: Any, x: Any, two: Any, axes: Any, eps: Any) -> Any:
        total = op.ReduceSum(op.Pow(x, two), axes, _allow_other_attributes=True)
        return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(total, eps))))

    def check(self, context: Any, x: ir.Value, two: ir.Value, axes: ir.Value, eps: ir.Value) -> bool:  # type: ignore[override]
        values = [_scalar(value) for value in (two, axes, eps)]
        known = x.shape is not None and isinstance(x.shape[-1], int) and x.dtype == ir.DataType.FLOAT
        return known and values[:2] == [2, -1] and values[2] is not None

    def rewrite(self, op: Any, x: ir.Value, two: ir.Value, axes: ir.Value, eps: ir.Value) -> Any:
        assert x.shape is not None
        width: Any = x.shape[-1]
        weight = op.Constant(value=ir.tensor(np.full(width, width**-0.5, np.float32)))
        return op.RMSNormalization(x, weight, axis=-1, epsilon=(_scalar(eps) or 0.0) / width)


def _scalar(value: ir.Value) -> float | None:
    tensor = ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def rewrite_block(model: ir.Model, *, rotations: bool) -> None:
    """Rewrite the graph of a block.

    Args:
        rotations: write rotations of one token as RotaryEmbedding.
    """
    rewrite(model, [_Softplus.rule(), _UnitNorm.rule(), _UnitLength.rule(), *([_Rotation.rule()] if rotations else [])])


def skip_reshapes(graph: ir.Graph) -> None:
    """Remove Reshape and Transpose operators that keep the order of the elements and, together, the shape.

    Tracing leaves many: heads are split and moved before a rotation or a norm, merged again for attention, and moved back. What reads
    the last of them reads what the first one read. Unused nodes stay until `zoo.export.trace.tidy`.
    """
    source: dict[ir.Value, ir.Value] = {}  # value with the same elements in the same order
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if not _keeps_order(node):
            continue
        before, after = node.inputs[0], node.outputs[0]
        assert before is not None
        source[after] = first = source.get(before, before)
        if _same(first.shape, after.shape) and not after.is_graph_output():
            ir.convenience.replace_all_uses_with(after, first)
        elif node.op_type == "Reshape" and first is not before and _is_explicit(node):
            node.replace_input_with(0, first)


def _keeps_order(node: ir.Node) -> bool:
    """Return True for a Reshape, and for a Transpose that moves only dimensions of size 1."""
    if node.domain or node.op_type not in ("Reshape", "Transpose"):
        return False
    if node.op_type == "Reshape":
        return True
    before = node.inputs[0]
    if before is None or before.shape is None or "perm" not in node.attributes:
        return False
    moved = [axis for axis in node.attributes["perm"].as_ints() if before.shape[axis] != 1]
    return moved == sorted(moved)


def _is_explicit(node: ir.Node) -> bool:
    """Return True for a Reshape whose shape does not refer to that of its input."""
    shape = node.inputs[1]
    sizes = None if shape is None else ir.convenience.get_const_tensor(shape)
    return sizes is not None and 0 not in sizes.numpy()


def _same(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Return True if two shapes are known to be equal."""
    unknown = one is None or other is None or any(isinstance(size, ir.SymbolicDim) and size.value is None for size in (*one, *other))
    return not unknown and one == other

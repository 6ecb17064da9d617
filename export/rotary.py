"""Rotation of queries and keys as one operator, in place of the eight that PyTorch's form is traced to."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase, rewrite


class _Rotation(RewriteRuleClassBase):
    """`zoo.blocks.attention.rotate` of whole heads x [B, H, 1, D] by angles [B, 1, 1, D/2]."""

    def pattern(self, op: Any, x: Any, sizes: Any, cos: Any, sin: Any) -> Any:
        a, b = op.Split(x, sizes, axis=3, _outputs=2)
        return op.Concat(op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin)), axis=-1)

    def rewrite(self, op: Any, x: ir.Value, sizes: ir.Value, cos: ir.Value, sin: ir.Value) -> Any:
        assert x.shape is not None
        heads, width = x.shape[1], x.shape[3]
        # operators for [B, T, H D], as projections and attention have it: onnxruntime cancels the transpositions
        tokens = op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, heads * width]))
        angles = [op.Squeeze(table, op.Constant(value_ints=[1])) for table in (cos, sin)]
        rotated = op.RotaryEmbedding(tokens, *angles, num_heads=heads)
        return op.Transpose(op.Reshape(rotated, op.Constant(value_ints=[0, 0, heads, width])), perm=[0, 2, 1, 3])


def fuse_rotations(model: ir.Model) -> None:
    """Replace the rotations of a token by RotaryEmbedding."""
    rewrite(model, [_Rotation.rule()])

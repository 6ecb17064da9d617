"""Public API of the L2 norm."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.l2norm.reference import normed


def l2norm(x: Tensor, *, eps: float = 1e-6, form: str | None = None) -> Tensor:
    """Compute x / sqrt(sum(x^2) + eps) over the last dimension, in float32 or wider. The delta rule uses it for queries and keys.

    Args:
        x: [..., N].
        form: "reference" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Raises:
        ZooError: the form does not exist or cannot run here.
    """
    y: Tensor = choose("l2norm", x, "reference", form)(x, eps)
    return y


operators.register("l2norm", l2norm)
kernels.register("l2norm.reference", normed)
kernels.register("l2norm.triton", triton_form("l2norm"))

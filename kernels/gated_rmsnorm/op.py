"""Public API of the root mean square norm with a gate."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.gated_rmsnorm.reference import normed
from zoo.kernels.rmsnorm.op import check_weight


def gated_rmsnorm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-5, gate_first: bool = False, form: str | None = None
) -> Tensor:
    """Compute weight * norm(x) * silu(gate) (Gated DeltaNet, arXiv 2412.06464, section 3.3), or weight * norm(x * silu(gate)).

    The norm divides by sqrt(mean(x^2) + eps) over the last dimension, in float32 or wider.

    Args:
        x, gate: [..., N], or [..., G, N] with a weight for each group. weight: [N] or [G, N].
        gate_first: apply the gate before the norm, as in Mamba-2 (arXiv 2405.21060, section 7).
        form: "reference" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        y in gate's dtype. The norm is rounded to that dtype before the weight is applied; the Triton form rounds nowhere else.
    Raises:
        ValueError: the shapes do not match.
        ZooError: the form does not exist or cannot run here.
    """
    check_weight(x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gate {list(gate.shape)}: want {list(x.shape)}, the shape of x")
    y: Tensor = choose("gated_rmsnorm", x, "reference", form)(x, gate, weight, eps, gate_first)
    return y


operators.register("gated_rmsnorm", gated_rmsnorm)
kernels.register("gated_rmsnorm.reference", normed)
kernels.register("gated_rmsnorm.triton", triton_form("gated_rmsnorm"))

"""Public API of the root mean square norm."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.rmsnorm.reference import normed

Style = Literal["plain", "wide", "centred"]
STYLES = get_args(Style)


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, style: Style = "plain", form: str | None = None) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) times a weight, over the last dimension, in float32 or wider (arXiv 1910.07467, eq. 4).

    Args:
        x: [..., N], or [..., G, N] with a weight for each group. weight: [N] or [G, N].
        style: "plain" casts back to x's dtype before the weight is applied, as in Llama; "wide" after, as in Jet-Nemotron;
            "centred" applies 1 + weight and casts after, as in Qwen3-Next.
        form: "reference" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        y, of the shape and dtype of x; "plain" with a weight of a wider dtype returns that dtype.
    Raises:
        ValueError: the shapes do not match, or the style does not exist.
        ZooError: the form does not exist or cannot run here.
    """
    check_weight(x, weight)
    if style not in STYLES:
        raise ValueError(f"style: '{style}' is not one of: {', '.join(STYLES)}")
    y: Tensor = choose("rmsnorm", x, "reference", form)(x, weight, eps, style)
    return y


def check_weight(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the weight has the shape of x's last dimension or last two dimensions."""
    if weight.ndim not in (1, 2) or weight.shape != x.shape[x.ndim - weight.ndim :]:
        raise ValueError(f"weight {list(weight.shape)}: want [N] or [G, N] for x {list(x.shape)} as [..., N] or [..., G, N]")


operators.register("rmsnorm", rmsnorm)
kernels.register("rmsnorm.reference", normed)
kernels.register("rmsnorm.triton", triton_form("rmsnorm"))

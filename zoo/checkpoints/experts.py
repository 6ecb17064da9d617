"""Names of mixtures of experts in upstream checkpoints."""

from __future__ import annotations

from zoo.checkpoints.family import Names, Stacked


def one_by_one(prefix: str, router: str, up: tuple[str, ...] = ("gate_proj", "up_proj"), down: str = "down_proj") -> Names:
    """Return the names of a router, and of experts that are stored separately.

    Args:
        router: name of the router's projection.
        up: names of each expert's projections to its hidden width, the activated one first.
        down: name of the projection back.
    """
    return {
        prefix + router: "mlp.router.proj.weight",
        tuple(f"{prefix}experts.{{}}.{name}.weight" for name in up): "mlp.experts.up",
        (f"{prefix}experts.{{}}.{down}.weight",): "mlp.experts.down",
    }


def stacked(router: str, up: str, down: str) -> Names:
    """Return the names of a router, and of experts that are stored as stacks."""
    return {router: "mlp.router.proj.weight", up: "mlp.experts.up", down: "mlp.experts.down"}


def gated(theirs: str, ours: str) -> Names:
    """Return the names of a SwiGLU with upstream's usual names."""
    return {f"{theirs}{name}_proj.weight": f"{ours}{name}_proj.weight" for name in ("gate", "up", "down")}


def joined(theirs: str, ours: str) -> Names:
    """Return the names of a SwiGLU whose gate and up projections are stored as one."""
    return {
        f"{theirs}input_linear.weight": Stacked((f"{ours}gate_proj.weight", f"{ours}up_proj.weight")),
        f"{theirs}output_linear.weight": f"{ours}down_proj.weight",
    }

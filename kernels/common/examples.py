"""Example inputs of every operator, as a model would produce them: for tests, the self-check and benchmarks.

`example.py` beside an operator's `op.py` defines them:

    inputs(random, batch, T, *, <sizes with defaults>) -> arguments by name
        The default sizes are small enough for a CPU and large enough to fill several tiles.
    WIDE: names of the inputs that a model keeps in float32 when its activations are narrower.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.dispatch import operators

Random = Callable[..., Tensor]
Inputs = dict[str, Any]  # arguments of the operator by name


def example(
    operator: str, *, T: int, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **sizes: int
) -> Inputs:
    """Return arguments of `operator`, without `output_final_state`. Each is a floating leaf that requires gradients.

    Args:
        sizes: as in the rows of tuned.json: K and V of gated_delta_rule, N of selective_scan, P and N of ssd, D and W of
            the convolutions; and H, HV, G or D where the operator has heads, groups or channels.
    """
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    module = importlib.import_module(f"{operators.get(operator).__module__.removesuffix('.op')}.example")
    made = module.inputs(random, batch, T, **sizes)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x.to(wide if name in module.WIDE else dtype).detach().requires_grad_() for name, x in made.items()}

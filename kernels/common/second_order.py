"""Second derivatives of operators with a hand-written gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(run: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of `run(*inputs)`, recorded so that they can be differentiated again; None for other inputs."""
    with torch.enable_grad():
        # an alias of each input, so that no path from one input to another is counted twice
        aliases = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
        wanted = [i for i, x in enumerate(aliases) if isinstance(x, Tensor) and x.requires_grad]
        found = torch.autograd.grad(run(*aliases), [aliases[i] for i in wanted], grads, create_graph=True, allow_unused=True)
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(i) for i in range(len(inputs)))

"""Refusal of arguments that an adapter does not support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def refuse(function: str, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first argument that is neither None nor False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{function}: {name}: {shown} is not supported; leave it out")

"""Dtypes of models, given as torch.dtype or by name."""

from __future__ import annotations

import torch

from zoo.errors import ZooError
from zoo.registry import nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the floating-point dtype with this name ("bfloat16", "torch.bfloat16"). Raises ZooError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ZooError(f"dtype: '{name}' is not a dtype of models; {nearest(name, DTYPES)}")
    return DTYPES[name]

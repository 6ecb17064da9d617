"""Devices by name."""

from __future__ import annotations

import torch

from zoo.errors import ZooError


def usable_device(name: str | torch.device, *, meta: bool = True) -> torch.device:
    """Return a device of this machine, or with `meta` also "meta". Raises a ZooError if there is no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta" and not meta:
            raise RuntimeError
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ImportError):  # each backend raises its own
        raise ZooError(f"device: '{name}' is not available on this machine; allowed: {', '.join(_available() + ['meta'] * meta)}") from None
    return device


def _available() -> list[str]:
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return ["cpu"]
    return ["cpu", *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))]

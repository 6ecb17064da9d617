"""Mamba's scans with the names and arguments of mamba_ssm (2.3), as drop-in replacements."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.compat.refuse import refuse
from zoo.kernels.selective_scan.op import selective_scan
from zoo.kernels.ssd.op import ssd


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `zoo.kernels.selective_scan`. u, delta, z: [B, D, L]. A: [D, N], real. B, C: [B, N, L] or [B, 1, N, L]. D, delta_bias: [D].

    Returns y [B, D, L], times silu(z), and the last state [B, D, N] if requested. Unlike upstream, the state has a gradient.
    """
    if A.is_complex():
        raise ValueError("selective_scan_fn: A: complex numbers are not supported; want real [D, N]")
    B, C = _one_group("B", B), _one_group("C", C)
    wide = torch.promote_types(u.dtype, torch.float32)
    step = _steps(delta.mT, delta_bias, delta_softplus, wide)
    y, state = selective_scan(u.mT.to(wide), step, A, B.mT, C.mT, output_final_state=True)
    assert state is not None
    y = y if D is None else y + D * u.mT
    y = (y if z is None else y * F.silu(z.mT.to(wide))).mT.to(u.dtype)
    return (y, state) if return_last_state else y


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `zoo.kernels.ssd`. x, z: [B, L, H, P]. dt: [B, L, H]. A, dt_bias: [H]. B, C: [B, L, G, N]. D: [H] or [H, P].

    States: [B, H, P, N]. `chunk_size` is ignored. `seq_idx` and `cu_seqlens` are refused; for packed sequences call `zoo.kernels.ssd`.
    """
    unsupported = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "return_varlen_states": return_varlen_states}
    refuse("mamba_chunk_scan_combined", unsupported)
    wide = torch.promote_types(x.dtype, torch.float32)
    step = _steps(dt, dt_bias, dt_softplus, wide).clamp(*dt_limit)
    before = None if initial_states is None else initial_states.mT
    y, state = ssd(x.to(wide), step, A, B, C, initial_state=before, output_final_state=True)
    assert state is not None
    y = y if D is None else y + (D if D.ndim == 2 else D[:, None]) * x
    y = (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)
    return (y, state.mT) if return_final_states else y


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    step = delta.to(dtype) if bias is None else delta.to(dtype) + bias
    return F.softplus(step) if softplus else step


def _one_group(name: str, x: Tensor) -> Tensor:
    if x.ndim == 4 and x.shape[1] == 1:
        return x[:, 0]
    if x.ndim != 3:
        raise ValueError(f"selective_scan_fn: {name} {list(x.shape)}: want [B, N, L] or [B, 1, N, L]; constant or grouped is not supported")
    return x

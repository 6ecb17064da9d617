"""The short convolution with the names and arguments of the package causal_conv1d (1.5), as a drop-in replacement."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.kernels.causal_conv1d.op import causal_conv1d
from zoo.kernels.compat.refuse import refuse


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Literal["silu", "swish"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve x: [B, D, T]. weight: [D, W]. bias: [D]. States: [B, D, W - 1]. Returns y [B, D, T], and the final states if requested."""
    refuse("causal_conv1d_fn", {"seq_idx": seq_idx})
    y, final = causal_conv1d(
        x.mT,
        weight,
        bias,
        activation="silu" if activation == "swish" else activation,
        initial_state=initial_states,
        output_final_state=True,
    )
    if not return_final_states:
        return y.mT
    assert final is not None
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return y.mT, final


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu", "swish"] | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve x: [B, D] or [B, D, T]. conv_state: [B, D, N], the last N >= W - 1 inputs, updated in place."""
    refuse("causal_conv1d_update", {"cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices})
    size, new = weight.shape[-1] - 1, x if x.ndim == 3 else x[..., None]
    if conv_state.shape[:2] != new.shape[:2] or conv_state.shape[2] < size:
        raise ValueError(f"conv_state {list(conv_state.shape)}: want [B, D, N], N at least {size}, for x {list(x.shape)}")
    before = conv_state[..., conv_state.shape[2] - size :]
    y, _ = causal_conv1d(new.mT, weight, bias, activation="silu" if activation == "swish" else activation, initial_state=before)
    conv_state.copy_(torch.cat([conv_state, new.to(conv_state.dtype)], dim=-1)[..., new.shape[2] :])
    return y.mT.reshape(x.shape)

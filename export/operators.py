"""Operators as they appear in graphs: `portable` (standard ONNX operators) and `ort` (operators of com.microsoft where they exist).

The PyTorch kernels are traced, unless the dialect has a single operator that replaces them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic_multi_out

from zoo.kernels.dispatch import kernels

DOMAIN = "zoo"  # domain of placeholder nodes, which are replaced by traced graphs
MICROSOFT = "com.microsoft"
CHUNK = 64  # tokens per iteration of a Scan
UNROLLED = 8  # up to this many chunks are unrolled; more become a Scan

Kernel = Callable[..., tuple[Tensor, Tensor]]


class ScanBody(nn.Module):
    """One iteration of a Scan over chunks: state, a chunk of every scanned tensor, fixed tensors -> state, output."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        state, *rest = inputs.values()
        output, state = self.kernel(*rest, state)
        return {"state_out": state, "output": output}


class Scan(NamedTuple):
    body: ScanBody
    example: Mapping[str, Tensor]
    """Example inputs of the body."""


Scans = dict[str, Scan]
"""Scans encountered while a module is traced, by the name of their placeholder nodes."""


def over_chunks(
    scans: Scans, name: str, kernel: Kernel, tokens: list[Tensor], fixed: list[Tensor], state: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute kernel(*tokens, *fixed, state) over tokens [B, T, ...]; long inputs become a Scan, which is added to `scans`.

    Returns an output with the shape of `like`, and the final state. Zero padding at the end must leave the state unchanged.
    """
    T = like.shape[1]
    if T <= UNROLLED * CHUNK:
        return kernel(*tokens, *fixed, state)

    def by_chunk(x: Tensor) -> Tensor:  # [B, T, ...] -> [T / CHUNK, B, CHUNK, ...]
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, -T % CHUNK)).unflatten(1, (-1, CHUNK)).transpose(0, 1)

    chunks = [by_chunk(x) for x in tokens]
    example = {"state": state.new_zeros(2, *state.shape[1:], device="cpu")}
    example |= {f"chunk{i}": torch.zeros(2, *x.shape[2:], dtype=x.dtype) for i, x in enumerate(chunks)}
    example |= {f"fixed{i}": torch.zeros(x.shape, dtype=x.dtype) for i, x in enumerate(fixed)}
    key = " ".join([name, *("x".join(map(str, x.shape)) for x in example.values())])
    scans[key] = Scan(ScanBody(kernel), example)
    final, y = symbolic_multi_out(
        f"{DOMAIN}::Scan",
        [state, *chunks, *fixed],
        {"scan": key, "chunks": len(chunks)},
        dtypes=[state.dtype, like.dtype],
        shapes=[state.shape, [*chunks[0].shape[:3], *like.shape[2:]]],
        version=1,
    )
    return y.transpose(0, 1).flatten(1, 2)[:, :T], final


def delta_rule(
    scans: Scans, operator: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor, cu_seqlens: None
) -> tuple[Tensor, Tensor]:
    """Compute `gated_delta_rule` or `kda`, which take the same arguments."""
    if q.shape[1] == 1:
        return kernels.get(f"{operator}.reference")(q, k, v, g, beta, scale, state, None)
    chunked = kernels.get(f"{operator}.chunked")
    kernel = lambda *x: chunked(*x[:5], scale, x[5], None)  # noqa: E731
    return over_chunks(scans, f"{operator} {scale}", kernel, [q, k, v, g, beta], [], state, v)


def state_space(
    scans: Scans, operator: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: None
) -> tuple[Tensor, Tensor]:
    """Compute `ssd` or `selective_scan`, which take the same arguments."""
    if x.shape[1] == 1:
        return kernels.get(f"{operator}.reference")(x, dt, A, B, C, state, None)
    chunked = kernels.get(f"{operator}.chunked")
    kernel = lambda x, dt, B, C, A, state: chunked(x, dt, A, B, C, state, None)  # noqa: E731
    return over_chunks(scans, operator, kernel, [x, dt, B, C], [A], state, x)


def linear_attention(rule: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: list[Tensor], scale: float, state: Tensor) -> Any:
    """Call LinearAttention of com.microsoft, which onnxruntime implements on CPUs in float32 only.

    q, k: [B, T, H, K]; neighbouring heads of v share one. v: [B, T, HV, V]. g (log decay): [B, T, HV] or [B, T, HV, K].
    beta: [B, T, HV]. state: [B, HV, K, V].
    """
    heads = v.shape[2]
    o, final = symbolic_multi_out(
        f"{MICROSOFT}::LinearAttention",
        [*(x.to(state.dtype).flatten(2) for x in (q, k, v)), state, g.to(state.dtype).flatten(2), *(x.to(state.dtype) for x in beta)],
        {"q_num_heads": q.shape[2], "kv_num_heads": heads, "update_rule": rule, "scale": float(scale)},
        dtypes=[state.dtype, state.dtype],
        shapes=[[*v.shape[:2], v.shape[2] * v.shape[3]], state.shape],
        version=1,
    )
    return o.unflatten(-1, (heads, -1)).to(v.dtype), final


def delta_rule_operator(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor, cu_seqlens: None
) -> tuple[Tensor, Tensor]:
    return linear_attention("gated_delta", q, k, v, g, [beta], scale, state)


def ssd_operator(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: None) -> tuple[Tensor, Tensor]:
    step = dt.to(state.dtype)
    y, final = linear_attention("gated", C, B, x.to(state.dtype) * step[..., None], step * A.to(state.dtype), [], 1.0, state)
    return y.to(x.dtype), final


def convolution_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, tail: Tensor, cu_seqlens: None
) -> tuple[Tensor, Tensor]:
    """Call CausalConvWithState of com.microsoft, which onnxruntime implements on CPUs in float32 only.

    x: [B, T, C]. weight: [C, K]. tail: [B, C, K-1].
    """
    inputs = [x.mT, weight[:, None], bias, tail]
    y, newest = symbolic_multi_out(
        f"{MICROSOFT}::CausalConvWithState",
        [None if tensor is None else tensor.float() for tensor in inputs],
        {"activation": "silu" if silu else "none"},
        dtypes=[torch.float32] * 2,
        shapes=[x.mT.shape, tail.shape],
        version=1,
    )
    return y.mT.to(x.dtype), newest.to(x.dtype)


def portable(scans: Scans) -> dict[str, Kernel]:
    return {
        "gated_delta_rule": partial(delta_rule, scans, "gated_delta_rule"),
        "kda": partial(delta_rule, scans, "kda"),
        "ssd": partial(state_space, scans, "ssd"),
        "selective_scan": partial(state_space, scans, "selective_scan"),
    }


def ort(scans: Scans) -> dict[str, Kernel]:
    return {
        "gated_delta_rule": delta_rule_operator,
        "kda": delta_rule_operator,
        "ssd": ssd_operator,
        "selective_scan": partial(state_space, scans, "selective_scan"),
        "causal_conv1d": convolution_operator,
    }


DIALECTS: dict[str, Callable[[Scans], dict[str, Kernel]]] = {"portable": portable, "ort": ort}
"""Functions for `zoo.kernels.dispatch.replaced` while a graph is traced; they add the Scans that they need to `scans`."""

"""The adapters against the definitions of the packages they replace, token by token in float64."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.checking import relative
from zoo.kernels.compat import causal_conv1d as conv
from zoo.kernels.compat import fla, mamba_ssm

generator = torch.Generator().manual_seed(3)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def assert_close(found: Any, wanted: Any) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert relative(x, y) < 1e-12


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """x [B, D, T], before [B, D, W - 1]."""
    inputs, W = torch.cat([before, x], dim=-1), weight.shape[1]
    y = torch.stack([(inputs[..., t : t + W] * weight).sum(-1) for t in range(x.shape[2])], dim=-1)
    return y if bias is None else y + bias[:, None]


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, S: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    outputs = []
    for t in range(v.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, dim=1), S


def delta_inputs() -> tuple[Tensor, ...]:
    q, k, v = randn(2, 9, 2, 6), randn(2, 9, 2, 6) / 3, randn(2, 9, 4, 5)
    return q, k, v, -randn(2, 9, 4).abs(), randn(2, 9, 4).sigmoid(), randn(2, 4, 6, 5)


def test_chunk_gated_delta_rule() -> None:
    q, k, v, g, beta, state = delta_inputs()
    assert_close(fla.chunk_gated_delta_rule(q, k, v, g, beta, 0.7, state, True), delta_rule(q, k, v, g, beta, 0.7, state))
    unit = [x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k)]
    found = fla.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert_close(found, delta_rule(*unit, v, g, beta, 6**-0.5, 0 * state))
    assert fla.chunk_gated_delta_rule(q, k, v, g, beta)[1] is None
    cu_seqlens = torch.tensor([0, 4, 9])
    row = [x[:1] for x in (q, k, v, g, beta)]
    _, final = fla.chunk_gated_delta_rule(*row, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    ends = [delta_rule(*(x[:, a:b] for x in row), 1.0, state[i : i + 1])[1] for i, (a, b) in enumerate([(0, 4), (4, 9)])]
    assert_close([final], [torch.cat(ends)])


def test_fused_recurrent_gated_delta_rule() -> None:
    q, k, v, g, beta, state = delta_inputs()
    found = fla.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=state, output_final_state=True)
    assert_close(found, delta_rule(q, k, v, g, beta, 6**-0.5, state))
    found = fla.fused_recurrent_gated_delta_rule(q, k, v, initial_state=state, output_final_state=True)
    assert_close(found, delta_rule(q, k, v, 0 * g, 0 * beta + 1, 6**-0.5, state))


@pytest.mark.parametrize("T", [2, 7])
def test_fla_convolution(T: int) -> None:
    """fla keeps W inputs, one more than are read."""
    x, weight, bias, residual, cache = randn(2, T, 3), randn(3, 4), randn(3), randn(2, T, 3), randn(2, 3, 4)
    found = fla.causal_conv1d(x, weight, bias, residual, cache, True, "swish")
    wanted = silu(convolved(x.mT, weight, bias, cache[..., 1:])).mT + residual, torch.cat([cache, x.mT], dim=-1)[..., -4:]
    assert_close(found, wanted)
    y, final = fla.causal_conv1d(x, weight, output_final_state=True)
    assert_close((y, final), (convolved(x.mT, weight, None, 0 * cache[..., 1:]).mT, torch.cat([0 * cache, x.mT], dim=-1)[..., -4:]))


def test_causal_conv1d_fn() -> None:
    x, weight, bias, before, kept = randn(2, 3, 6), randn(3, 4), randn(3), randn(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.float64)
    wanted = convolved(x, weight, bias, before)
    assert_close([conv.causal_conv1d_fn(x, weight, bias, initial_states=before)], [wanted])
    found = conv.causal_conv1d_fn(x, weight, bias, None, before, True, kept, "silu")
    assert_close(found, (silu(wanted), x[..., -3:]))
    assert torch.equal(kept, x[..., -3:])


def test_causal_conv1d_update() -> None:
    weight, bias, cache = randn(3, 4), randn(3), randn(2, 3, 5)
    inputs = cache.clone()
    for x in (randn(2, 3), randn(2, 3, 1), randn(2, 3, 2)):
        found = conv.causal_conv1d_update(x, cache, weight, bias, "swish")
        assert_close([found], [silu(convolved(x.view(2, 3, -1), weight, bias, inputs[..., -3:])).view(x.shape)])
        inputs = torch.cat([inputs, x.view(2, 3, -1)], dim=-1)
        assert torch.equal(cache, inputs[..., -5:])
    with pytest.raises(ValueError, match=r"conv_state \[2, 3, 2\]: want \[B, D, N\], N at least 3"):
        conv.causal_conv1d_update(x, cache[..., :2], weight)


def test_selective_scan_fn() -> None:
    u, delta, z, A, B, C = randn(2, 3, 7), randn(2, 3, 7), randn(2, 3, 7), -randn(3, 4).exp(), randn(2, 4, 7), randn(2, 4, 7)
    D, bias = randn(3), randn(3)
    step, S, outputs = (1 + (delta + bias[:, None]).exp()).log(), torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(7):
        S = S * (step[:, :, t, None] * A).exp() + (step * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((S * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    found = mamba_ssm.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    assert_close(found, ((y + D[:, None] * u) * silu(z), S))
    assert_close([mamba_ssm.selective_scan_fn(u, step, A, B[:, None], C[:, None])], [y])


@pytest.mark.parametrize("wide_skip", [False, True])
def test_mamba_chunk_scan_combined(wide_skip: bool) -> None:
    x, z, dt, A, B, C = randn(2, 7, 4, 3), randn(2, 7, 4, 3), randn(2, 7, 4), -randn(4).exp(), randn(2, 7, 2, 5), randn(2, 7, 2, 5)
    D, bias, before = randn(4, 3) if wide_skip else randn(4), randn(4), randn(2, 4, 3, 5)
    step, S, outputs = (1 + (dt + bias).exp()).log().clamp(0.5, 1.0), before, []
    for t in range(7):
        b, c = (value[:, t].repeat_interleave(2, dim=1) for value in (B, C))
        S = S * (step[:, t] * A).exp()[..., None, None] + (step[:, t, :, None] * x[:, t])[..., None] * b[:, :, None]
        outputs.append((S * c[:, :, None]).sum(-1))
    wanted = (torch.stack(outputs, dim=1) + x * (D if wide_skip else D[:, None])) * silu(z)
    found = mamba_ssm.mamba_chunk_scan_combined(
        x, dt, A, B, C, 256, D, z, bias, before, dt_softplus=True, dt_limit=(0.5, 1.0), return_final_states=True
    )
    assert_close(found, (wanted, S))


def test_what_is_lacking_is_refused() -> None:
    q, k, v, g, beta, state = delta_inputs()
    with pytest.raises(ValueError, match=r"chunk_gated_delta_rule: state_v_first: True is not supported; leave it out"):
        fla.chunk_gated_delta_rule(q, k, v, g, beta, state_v_first=True)
    with pytest.raises(ValueError, match=r"fused_recurrent_gated_delta_rule: gk: a tensor \[2, 9, 4\] is not supported"):
        fla.fused_recurrent_gated_delta_rule(q, k, v, g, beta)
    with pytest.raises(ValueError, match="causal_conv1d_fn: seq_idx"):
        conv.causal_conv1d_fn(q[0], q[0, 0], seq_idx=torch.zeros(9, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"B \[2, 4, 6, 5\]: want \[B, N, L\] or \[B, 1, N, L\]"):
        mamba_ssm.selective_scan_fn(v[0], v[0], v[0, 0], state, state)
    with pytest.raises(ValueError, match="mamba_chunk_scan_combined: seq_idx"):
        mamba_ssm.mamba_chunk_scan_combined(v, g, g[0, 0], q, q, 64, seq_idx=torch.zeros(2, 9))


def test_positions_of_arguments_are_upstreams() -> None:
    def names(function: Any) -> str:
        return " ".join(inspect.signature(function).parameters)

    assert names(fla.chunk_gated_delta_rule).startswith("q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel")
    assert names(fla.fused_recurrent_gated_delta_rule).startswith("q k v g gk gv beta scale initial_state output_final_state")
    assert names(mamba_ssm.selective_scan_fn) == "u delta A B C D z delta_bias delta_softplus return_last_state"
    assert names(mamba_ssm.mamba_chunk_scan_combined).startswith("x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens")

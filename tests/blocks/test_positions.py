"""Rotary angles far from the start of a stream."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

import zoo
from zoo.blocks.positions import Positions
from zoo.blocks.rotary import Rope

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


@pytest.mark.parametrize("start", [0, 4096, 10**7, 2**40])
@pytest.mark.parametrize(("dim", "theta"), [(2, 10_000.0), (6, 500_000.0), (64, 10_000.0)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-7), (torch.float64, 1e-8)])
def test_angles_are_exact_at_any_position(start: int, dim: int, theta: float, dtype: torch.dtype, error: float) -> None:
    cos, sin = Positions(start, 3, torch.device("cpu")).rotary(Rope(dim, theta), dtype)
    with localcontext(prec=60):
        for t in range(3):
            for i in range(dim // 2):
                frequency = Decimal(theta) ** (Decimal(-2 * i) / dim)
                angle = float((start + t) * frequency % (2 * PI))
                # a frequency is a multiple of 2^-64 turns, of a float64 exponent
                allowed = error + (start + t) * float(frequency) * 1e-14
                assert abs(cos[t, i].item() - math.cos(angle)) <= allowed
                assert abs(sin[t, i].item() - math.sin(angle)) <= allowed


@torch.no_grad()
@pytest.mark.parametrize("start", [10**6, 10**7])
def test_logits_depend_on_distances_only(start: int) -> None:
    blocks = {"attn": {"heads": 2}, "swa": {"heads": 2, "window": 6, "rotary": 0.5}}
    model = zoo.create("gdn4-sleep1", layers="attn swa", blocks=blocks, evict="sliding", window=8, d_model=32, vocab_size=16, d_ff=32)
    ids = torch.arange(20)[None] % 16

    def logits(position: int) -> torch.Tensor:
        state = model.init_state()._replace(position=position)
        first, state = model(ids[:, :13], state)
        return torch.cat([first, model(ids[:, 13:], state).logits], dim=1)

    torch.testing.assert_close(logits(start), logits(0), rtol=0, atol=1e-5)

"""Rotary frequencies: plain (RoFormer, arXiv 2104.09864), and scaled to contexts longer than those trained on."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from zoo.errors import ZooError

TURN = 2.0**64  # units of a full turn: int64 arithmetic wraps around where an angle does


class RopeScaling(BaseModel):
    """Scaling of rotary frequencies, with the formulas and defaults of transformers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Literal["linear", "dynamic", "yarn", "llama3"] = Field(
        description="linear: all frequencies / factor; dynamic: theta grows with the stream; yarn: arXiv 2309.00071; llama3: Llama 3.1"
    )
    factor: float = Field(ge=1, description="longer context / original context")
    original_length: int | None = Field(None, ge=1, description="original context in tokens; required by all types but linear")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: fewer turns than this in the original context: frequency / factor")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: more turns than this in the original context: frequency unchanged")
    beta_fast: float = Field(32.0, gt=0, description="yarn: more turns than this in the original context: frequency unchanged")
    beta_slow: float = Field(1.0, gt=0, description="yarn: fewer turns than this in the original context: frequency / factor")
    truncate: bool = Field(True, description="yarn: round the bounds given by beta_fast and beta_slow outwards to whole pairs")
    attention_factor: float | None = Field(None, description="yarn: multiplies cos and sin; default 0.1 ln(factor) + 1")

    @model_validator(mode="after")
    def _fits(self) -> RopeScaling:
        if self.type != "linear" and self.original_length is None:
            raise ValueError(f"original_length: type '{self.type}' needs it")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor: {self.low_freq_factor} must be less than high_freq_factor: {self.high_freq_factor}")
        return self


class Rope(NamedTuple):
    """Parameters of the rotary angles: plain numbers, so it is cheap to hash. Created by `rope`."""

    width: int
    """Rotated entries of a head; an odd width is rounded up to whole pairs."""
    theta: float
    type: str = "plain"
    factor: float = 1.0
    length: int = 0
    """Original context in tokens."""
    low: float = 0.0
    high: float = 0.0
    """Bounds of the ramp: in turns per original context for llama3, in pairs for yarn."""
    magnitude: float = 1.0
    """Factor of cos and sin."""

    @property
    def pairs(self) -> int:
        return -(-self.width // 2)

    def steps(self, tokens: int | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the angle per position of every pair, in turns / TURN: int64 [pairs], or [..., pairs] for `tokens` [...].

        Args:
            tokens: length of the stream up to the end of this pass, which only type dynamic depends on.
            dtype: floating dtype used where the angles depend on a tensor `tokens`; all else is float64.
        """
        theta: float | Tensor = self.theta
        if self.type == "dynamic":
            longest = tokens[..., None].to(dtype).clamp(min=self.length) if isinstance(tokens, Tensor) else max(tokens, self.length)
            stretch = self.factor * longest / self.length - (self.factor - 1)
            theta = theta * stretch ** (self.width / (self.width - 2))
        first = math.log2(TURN / (2 * math.pi))
        if isinstance(theta, Tensor):
            plain = theta ** -(torch.arange(0, self.width, 2, device=device, dtype=dtype) / self.width) * 2**first
        else:
            last = first - 2 * max(0, self.pairs - 1) / max(1, self.width) * math.log2(theta)
            plain = torch.linspace(first, last, self.pairs, device=device, dtype=torch.float64).exp2()
        if self.type == "llama3":
            ramp = ((self.length / TURN * plain - self.low) / (self.high - self.low)).clamp(0, 1)
        elif self.type == "yarn":
            ramp = 1 - ((torch.arange(self.pairs, device=device, dtype=plain.dtype) - self.low) / (self.high - self.low)).clamp(0, 1)
        else:
            return (plain / self.factor if self.type == "linear" else plain).to(torch.int64)
        return (ramp * plain + (1 - ramp) * plain / self.factor).to(torch.int64)


def rope(width: int, theta: float, scaling: RopeScaling | None = None) -> Rope:
    """Return the rotary frequencies of heads whose first `width` entries are rotated.

    Raises:
        ZooError: a theta or width for which this scaling is undefined.
    """
    if scaling is None or width == 0:
        return Rope(width, theta)
    length, low, high, magnitude = scaling.original_length or 0, 0.0, 0.0, 1.0
    if scaling.type == "dynamic" and width <= 2:
        raise ZooError(f"rope_scaling.type: 'dynamic' needs more than {width} rotated entries")
    if scaling.type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.type == "yarn":
        if theta <= 1:
            raise ZooError(f"rope_theta: {theta} must be greater than 1 for rope_scaling.type 'yarn'")
        low, high = (
            width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        magnitude = max(1.0, 0.1 * math.log(scaling.factor) + 1) if scaling.attention_factor is None else scaling.attention_factor
    return Rope(width, theta, scaling.type, scaling.factor, length, low, high, magnitude)

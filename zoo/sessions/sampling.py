"""How the next token is chosen."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Sampling(BaseModel):
    """How many tokens, which of them, and what ends them. Greedy unless told otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(ge=1, description="at most so many")
    stop: tuple[int, ...] = Field((), description="the last token: ends with the first of these")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: the likeliest token")
    top_k: int | None = Field(None, ge=1, description="among the so many likeliest")
    top_p: float | None = Field(None, gt=0, le=1, description="among the likeliest that have so much of the probability together")
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False, description="makes what has been seen less likely if above 1")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same tokens every time; None: others every time")


class Sampler:
    """Chooses tokens for B streams, and remembers which ones it has seen. A stream that has stopped repeats its last.

    Args:
        seen: tokens that count as repeated, [B, T] int64.
    """

    def __init__(self, sampling: Sampling, seen: Tensor, vocab_size: int) -> None:
        self.sampling = sampling
        self.seen = torch.zeros(seen.shape[0], vocab_size, dtype=torch.bool, device=seen.device).scatter_(1, seen, True)
        self.generator = torch.Generator(seen.device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._stop = torch.tensor(sampling.stop, dtype=torch.int64, device=seen.device)
        self._over = torch.zeros(seen.shape[0], dtype=torch.bool, device=seen.device)
        self._last = self._over.long()

    @property
    def over(self) -> bool:
        """Whether every stream has stopped."""
        return bool(self._over.all())

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each stream, [B], from logits [B, V]."""
        scores = self.scores(logits)
        if self.sampling.temperature == 0:
            token = scores.argmax(-1)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]
        self._last = torch.where(self._over, self._last, token)
        self._over = self._over | torch.isin(self._last, self._stop)
        self.seen.scatter_(1, self._last[:, None], True)
        return self._last

    def scores(self, logits: Tensor) -> Tensor:
        """Log-probabilities up to a constant, [B, V] float32; -inf where a token is out of the question."""
        how = self.sampling
        scores = logits.float()
        if how.repetition_penalty != 1:  # CTRL, arXiv 1909.05858, section 4.1
            lower = torch.where(scores > 0, scores / how.repetition_penalty, scores * how.repetition_penalty)
            scores = torch.where(self.seen, lower, scores)
        if how.temperature > 0:
            scores = scores / how.temperature
        if how.top_k is not None and how.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(how.top_k).values[:, -1:], float("-inf"))
        if how.top_p is not None and how.top_p < 1:  # arXiv 1904.09751, section 3.1
            ordered, index = scores.sort(descending=True)
            share = ordered.softmax(-1)
            beyond = share.cumsum(-1) - share >= how.top_p  # what comes before a token has enough already
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), float("-inf"))
        return scores

"""Sampling of the next token."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Sampling(BaseModel):
    """Settings of one generation. Greedy by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(ge=1, description="maximum number of tokens")
    stop: tuple[int, ...] = Field((), description="stop tokens: generation ends with the first of them")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: always the most likely token")
    top_k: int | None = Field(None, ge=1, description="sample only from the k most likely tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="sample only from the smallest set of tokens with total probability p")
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False, description="above 1: tokens that were seen become less likely")
    seed: int | None = Field(None, ge=0, lt=2**63, description="makes the tokens reproducible; None: a random seed")


class Sampler:
    """Chooses tokens for B streams and records which ones were seen. A stream that has stopped repeats its last token.

    Args:
        seen: tokens to which the repetition penalty applies from the start, [B, T] int64.
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
        """True once every stream has stopped."""
        return bool(self._over.all())

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the next token of each stream, [B], from logits [B, V]."""
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
        """Unnormalised log-probabilities [B, V], float32; -inf for tokens that are excluded."""
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
            beyond = share.cumsum(-1) - share >= how.top_p  # the tokens before this one already reach top_p
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), float("-inf"))
        return scores

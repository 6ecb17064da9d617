"""Sampling of the next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from zoo.errors import ZooError

LogitsProcessor = Callable[[Tensor], Tensor]


@runtime_checkable
class Constraint(Protocol):
    """Decides which tokens a generation of one stream may consist of."""

    @property
    def over(self) -> bool:
        """True once nothing may follow; the generation then ends."""
        ...

    def allowed(self) -> Tensor:
        """Return which tokens may come next, bool [V], at least one."""
        ...

    def accept(self, token: int) -> None:
        """Continue with the token that was chosen."""
        ...


LEAST_TEMPERATURE = 1e-30  # its inverse is finite in float32; below, the most likely token has all the probability anyway
LARGEST = 1e30  # products with a count of tokens, and sums of several, are finite in float32
Penalty = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Bias = Annotated[float, Field(le=LARGEST, allow_inf_nan=True)]


class Sampling(BaseModel):
    """Settings of one generation. Greedy by default."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    tokens: int = Field(ge=1, description="maximum number of tokens")
    stop: tuple[int, ...] = Field((), description="stop tokens: generation ends with the first of them")
    temperature: float = Field(0.0, ge=0, le=LARGEST, description="0: always the most likely token")
    top_k: int | None = Field(None, ge=1, description="sample only from the k most likely tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="sample only from the smallest set of tokens with total probability p")
    min_p: float | None = Field(None, ge=0, le=1, description="sample only from tokens at least p times as likely as the most likely one")
    repetition_penalty: float = Field(1.0, ge=1 / LARGEST, le=LARGEST, description="above 1: tokens that were seen become less likely")
    presence_penalty: Penalty = Field(0.0, description="subtracted from the logits of tokens that were generated")
    frequency_penalty: Penalty = Field(0.0, description="subtracted for each time that a token was generated")
    logit_bias: Mapping[int, Bias] = Field({}, description="added to the logits of these tokens; -inf excludes one")
    logits_processor: LogitsProcessor | None = Field(None, description="returns the logits [B, V] to use in place of those it is given")
    constraint: Constraint | None = Field(None, description="decides which tokens may come next")
    seed: int | None = Field(None, ge=0, lt=2**63, description="makes the tokens reproducible; None: a random seed")


class Sampler:
    """Chooses tokens for B streams and records which ones were seen. A stream that has stopped repeats its last token.

    Args:
        seen: tokens to which the repetition penalty applies from the start, [B, T] int64.
    Raises:
        ZooError: a stop token, or a token of the logit bias, is outside the vocabulary; several streams have one constraint.
    """

    def __init__(self, sampling: Sampling, seen: Tensor, vocab_size: int) -> None:
        for token in sampling.stop:
            _check_token("stop", token, vocab_size)
        if sampling.constraint is not None and len(seen) != 1:
            raise ZooError(f"constraint: {len(seen)} streams; want 1")
        self.sampling = sampling
        self.seen = torch.zeros(seen.shape[0], vocab_size, dtype=torch.bool, device=seen.device).scatter_(1, seen, True)
        penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._counts = torch.zeros(self.seen.shape, device=seen.device) if penalised else None
        self._bias = self._logit_bias(vocab_size, seen.device) if sampling.logit_bias else None
        self._may_exclude_all = self._bias is not None or sampling.logits_processor is not None or sampling.constraint is not None
        self.generator = torch.Generator(seen.device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._stop = torch.tensor(sampling.stop, dtype=torch.int64, device=seen.device)
        self._over = torch.zeros(seen.shape[0], dtype=torch.bool, device=seen.device)
        self._last = self._over.long()

    def _logit_bias(self, vocab_size: int, device: torch.device) -> Tensor:
        bias = torch.zeros(vocab_size, device=device)
        for token, value in self.sampling.logit_bias.items():
            _check_token("logit_bias", token, vocab_size)
            bias[token] = value if value >= -LARGEST else -math.inf
        return bias

    @property
    def over(self) -> bool:
        """True once every stream has stopped."""
        return bool(self._over.all())

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the next token of each stream, [B], from logits [B, V]. Raises ZooError if every token is excluded."""
        scores = self.scores(logits)
        if self.sampling.temperature == 0:
            token = _most_likely(scores)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]
        if self.sampling.stop:
            token = torch.where(self._over, self._last, token)
            self._over = self._over | torch.isin(token, self._stop)
        self._last = token
        if (constraint := self.sampling.constraint) is not None:
            constraint.accept(int(self._last))
            self._over = self._over | constraint.over
        if self.sampling.repetition_penalty != 1:
            self.seen.scatter_(1, self._last[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, self._last[:, None], torch.ones_like(self._counts[:, :1]))
        return self._last

    def scores(self, logits: Tensor) -> Tensor:
        """Unnormalised log-probabilities [B, V], float32; -inf for tokens that are excluded."""
        how = self.sampling
        scores = logits.float()
        if how.logits_processor is not None:
            scores = _checked(how.logits_processor(scores.clone()), scores)  # it may work in place, and snapshots share the logits
        if how.constraint is not None:
            scores = scores.masked_fill(~how.constraint.allowed().to(scores.device), float("-inf"))
        if how.repetition_penalty != 1:  # CTRL, arXiv 1909.05858, section 4.1
            lower = torch.where(scores > 0, scores / how.repetition_penalty, scores * how.repetition_penalty)
            scores = torch.where(self.seen, lower, scores)
        if self._counts is not None:
            scores = scores - how.frequency_penalty * self._counts - how.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            scores = scores + self._bias
        if self._may_exclude_all and not scores.isfinite().any(-1).all():
            raise ZooError("generate: logit_bias, logits_processor and constraint exclude every token")
        if how.temperature > 0:
            scores = (scores - scores.amax(-1, keepdim=True)) / max(how.temperature, LEAST_TEMPERATURE)
        if how.top_k is not None and how.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(how.top_k).values[:, -1:], float("-inf"))
        if how.min_p:
            scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(how.min_p), float("-inf"))
        if how.top_p is not None and how.top_p < 1:  # arXiv 1904.09751, section 3.1
            ordered, index = scores.sort(descending=True)
            share = ordered.softmax(-1)
            beyond = share.cumsum(-1) - share >= how.top_p  # the tokens before this one already reach top_p
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), float("-inf"))
        return scores


def _most_likely(scores: Tensor) -> Tensor:
    """Return `scores.argmax(-1)`. On a CPU, numpy takes a tenth of the time of torch."""
    if scores.is_cpu:
        return torch.from_numpy(scores.detach().numpy().argmax(-1))
    return scores.argmax(-1)


def _checked(result: Any, scores: Tensor) -> Tensor:
    """Return what a logits processor returned for `scores`, as float32. Raises ZooError."""
    if not isinstance(result, Tensor) or result.shape != scores.shape or not result.is_floating_point():
        what = f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ZooError(f"logits_processor: returned {what}; want a tensor of floats {list(scores.shape)}")
    result = result.to(scores)
    if not (result < math.inf).all():
        raise ZooError("logits_processor: returned a logit that is NaN or +inf; -inf excludes a token")
    return result


def _check_token(field: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ZooError(f"{field}: token {token}; the vocabulary is 0 to {vocab_size - 1}")

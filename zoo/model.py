"""The model: wake pass, sleep, and the loop over passes that runs both. Shapes: B streams, T tokens, width D, vocabulary V."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import inputs
from zoo.blocks.block import last
from zoo.blocks.exit_gate import ExitGate
from zoo.blocks.mixer import Mixer
from zoo.blocks.moe import begin_pass
from zoo.blocks.norm import norms
from zoo.blocks.positions import Positions
from zoo.blocks.tied_head import TiedHead
from zoo.config import ModelConfig
from zoo.eviction import evictions
from zoo.loss import Recompute, answers
from zoo.stack import build_blocks, check_fits, embedding
from zoo.state import Answers, Output, State

Pass = list[tuple[int, int | None]]
"""Blocks that a pass runs, in order, and how many last tokens each returns; None: all."""


class Model(nn.Module):
    """A hybrid language model that sleeps. Build one with `zoo.create`. Raises ZooError for blocks or options that do not fit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.companions: Mapping[str, bytes] = {}  # files that travel with the weights, such as a tokenizer
        self.eviction = evictions.get(config.evict)(config.window)
        self.embed = embedding(config.vocab_size, config.d_model)
        if config.learned_positions:
            self.positions = embedding(config.window or 0, config.d_model)
        self.blocks = nn.ModuleList(build_blocks(config, self.eviction.reach))
        self.norm = norms[config.norm](config.d_model, eps=config.norm_eps)
        self.head = TiedHead(self) if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.exit = None if config.exit is None else ExitGate(config.d_model, **config.exit.model_dump())
        if config.inject:
            self.inject = nn.Parameter(torch.empty(config.d_model))
        if config.residual_gates:
            self.residual_gates = nn.Parameter(torch.empty(config.residual_gates))
        self._wide_residual = any(block.residual_in_fp32 for block in self.blocks)
        self.state_forms: inputs.StateForms = {}
        self._has_fast = [fast is not None for fast in self.init_state().fast]
        check_fits(config, self.eviction.restarts, any(self._has_fast))
        self.prelude, self.span, self.coda = range(config.looped.start), config.looped, range(config.looped.stop, len(self.blocks))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations; see `Mixer.dtype`."""
        return self.blocks[0].mixer.dtype  # type: ignore[return-value]

    @property
    def residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return torch.promote_types(self.dtype, torch.float32) if self._wide_residual else self.dtype

    def init_state(self, batch_size: int = 1) -> State:
        """Return the state of `batch_size` streams before their first token."""
        inputs.check_count("batch_size", batch_size)
        layers: list[Mixer] = [block.mixer for block in self.blocks]  # type: ignore[misc]
        window = tuple(m.new_window(batch_size) for _ in range(self.config.wake_loops) for m in layers)
        return State(tuple(m.new_fast(batch_size) for m in layers), window, 0)

    def forward(
        self, ids: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, logits_to_keep: int | None = None
    ) -> Output:
        """Run one wake pass over ids: [B, T] int64, continuing the stream at `state` (default: a new stream).

        Args:
            cu_seqlens: [S + 1] int32 or int64, offsets of S sequences packed into ids: [1, total], each continuing its own stream.
            logits_to_keep: number of last tokens whose logits are computed and returned, 0 to T; default: all.
        Raises:
            ZooError: arguments that do not fit the model or each other, or more tokens than the window has room for.
        """
        inputs.check_kept(ids, logits_to_keep)
        h, state = self.run(*self.start_wake(ids, state, cu_seqlens, keep=logits_to_keep))
        return Output(self.logits(h), state)

    def wake(
        self, ids: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None, recompute: bool = False
    ) -> tuple[Tensor, State]:
        """Run `forward` without the head: return the hidden states [B, T, D] ([B, T, loops, D] with wake loops) and the state.

        With `recompute`, the activations of each pass are recomputed in the backward pass instead of being stored.
        """
        return self.run(*self.start_wake(ids, state, cu_seqlens), recompute=recompute)

    def normed(self, h: Tensor) -> Tensor:
        """Apply the final norm, which the head follows: h [..., D] ([..., loops, D] with wake loops) -> [..., D]."""
        h = self.norm(h).to(self.dtype)
        if self.config.wake_loops > 1:
            h = h[..., -1, :] if self.exit is None else self.exit(h)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Apply the final norm and the head: h [..., D] ([..., loops, D] with wake loops) -> [..., V]."""
        if not h.numel():  # a quantised head may not run without rows
            return h.new_zeros(*h.shape[: -2 if self.config.wake_loops > 1 else -1], self.config.vocab_size, dtype=self.dtype)
        logits: Tensor = self.head(self.normed(h))
        logits = logits if self.config.logits_scale == 1 else logits * self.config.logits_scale
        return logits if (cap := self.config.logits_cap) is None else cap * (logits / cap).tanh()

    @property
    def wakes_as_it_sleeps(self) -> bool:
        """True if the wake pass is the first pass of a sleep: the span is every block, and both read the same embeddings."""
        return len(self.span) == len(self.blocks) and self.config.wake_loops == 1 and self.config.learned_positions != "asleep"

    def consolidate(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        loops: int | None = None,
        cu_seqlens: Tensor | None = None,
        awake: tuple[Tensor, State] | None = None,
        recompute: bool = False,
    ) -> State:
        """Sleep on one whole chunk, then evict its window cache.

        Runs the prelude once, the span `loops` times and the coda once. Each pass takes the previous pass's hidden states and
        continues from its S; each starts from the window cache as it was at the start of the chunk.

        Args:
            ids: tokens of the chunk, [B, T] int64, T at most the window.
            state: state at the chunk's start (default: a new stream). It is not changed.
            loops: passes of the span, default `config.loops`.
            cu_seqlens: as in `forward`; every sequence is one whole chunk.
            awake: result of `wake` for these tokens and this state, used as the first pass where `wakes_as_it_sleeps`.
            recompute: as in `wake`.
        Raises:
            ZooError: as `forward`; also more tokens than the window holds, loops < 1, or `awake` of other tokens, or for a model
                whose wake pass is not the first pass of a sleep.
        """
        inputs.check_awake(self, ids, awake, cu_seqlens)
        _, state = self.run(*self.start_sleep(ids, state, loops, cu_seqlens), awake=awake, recompute=recompute)
        return self.evict(state)

    def run(
        self, h: Tensor, start: State, positions: Positions, passes: list[Pass],
        *, awake: tuple[Tensor, State] | None = None, recompute: bool = False,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Run `passes` over tokens: the loop of a sleep and, with a single pass, of the wake pass.

        Each pass takes the previous pass's hidden states and continues from its fast weights, but starts from the window cache
        of `start`. `start_wake` and `start_sleep` return the first four arguments.

        Returns:
            Hidden states [B, T, D] ([B, T, loops, D] with wake loops) of the tokens that `passes` keeps, and the state before eviction.
        """
        inputs.check_flag("recompute", recompute)
        first, outputs = h, []
        fast, window = list(start.fast), dict(enumerate(start.window))
        if awake is not None:  # the wake pass was the first one
            h, fast, window = awake[0], list(awake[1].fast), dict(enumerate(awake[1].window))
        one_pass = partial(checkpoint, self._pass, use_reentrant=False) if recompute else self._pass
        for n, blocks in enumerate(passes):
            if n > 0 or awake is None:
                h, first, fast, caches = one_pass(n, blocks, start, positions, h, first, *fast)
                window |= caches
                outputs.append(h)
        h = torch.stack([last(output, h.shape[1]) for output in outputs], dim=-2) if self.config.wake_loops > 1 else h
        return h, State(tuple(fast), tuple(window.values()), positions.end)

    def _pass(
        self, n: int, blocks: Pass, start: State, positions: Positions, h: Tensor, first: Tensor, *fast_in: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor | None], dict[int, Any]]:
        """Run the blocks of pass n: return h, the span's first input, fast weights, and window caches by their place in a State.

        The fast weights are separate arguments because `checkpoint` stores no tensor that is inside a list.
        """
        begin_pass(n)
        fast, window = list(fast_in), {}
        for i, keep in blocks:
            if i == self.span.start:
                first, h = (h, h) if n == 0 else (first, self.between_passes(h, first))
                entered = h
            if n and not self.config.carry and i in self.span:
                fast[i] = start.fast[i]
            at = n % self.config.wake_loops * len(self.blocks) + i
            h, fast[i], window[at] = self.blocks[i](h, fast[i], start.window[at], positions, keep=keep)
            h = self.gated(h, last(entered, h.shape[1]), n) if i == self.span.stop - 1 else h
        return h, first, fast, window

    def passes(self, loops: int, *, asleep: bool = False, keep: int | None = None) -> list[Pass]:
        """Return the blocks that each pass runs: the first begins with the prelude, the last ends with the coda.

        A sleep that empties the window ends with the last mixer that has fast weights: nothing reads the outputs of later blocks.
        """
        passes: list[Pass] = [[(i, None) for i in self.span] for _ in range(loops)]
        passes[0][:0] = [(i, None) for i in self.prelude]
        passes[-1] += [(i, None) for i in self.coda]
        passes[-1][-1] = passes[-1][-1][0], keep
        if asleep and self.eviction.restarts:
            while not self._has_fast[passes[-1][-1][0]]:
                passes[-1].pop()
                if not passes[-1]:
                    passes.pop()
            passes[-1][-1] = passes[-1][-1][0], 0
        return passes

    def start_wake(
        self, ids: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None, *, keep: int | None = None
    ) -> tuple[Tensor, State, Positions, list[Pass]]:
        """Return the arguments of `run` for a wake pass that returns the last `keep` tokens. Raises the same errors as `forward`."""
        streams = inputs.count_streams(ids, cu_seqlens)
        inputs.check_packs(self, cu_seqlens)
        state = self.init_state(streams) if state is None else inputs.checked_state(self, state, ids, streams)
        positions = Positions(state.position, ids.shape[1], ids.device, cu_seqlens=cu_seqlens)
        inputs.check_room(self, ids, state, positions)
        return self.embedded(ids, positions), state, positions, self.passes(self.config.wake_loops, keep=keep)

    def start_sleep(
        self, ids: Tensor, state: State | None = None, loops: int | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State, Positions, list[Pass]]:
        """Return the arguments of `run` for a sleep. Raises the same errors as `consolidate`."""
        loops = self.config.loops if loops is None else loops
        inputs.check_count("loops", loops)
        inputs.check_one_window(self, ids, cu_seqlens)
        h, state, positions, _ = self.start_wake(ids, state, cu_seqlens)
        h = h if self.config.learned_positions != "asleep" else self.embedded(ids, positions, asleep=True)
        return h, state, positions, self.passes(loops * self.config.wake_loops, asleep=True)

    def evict(self, state: State) -> State:
        """Return the state after the eviction that ends a chunk."""
        window = tuple(None if cache is None else self.eviction.evict(cache) for cache in state.window)
        return State(state.fast, window, 0 if self.eviction.restarts else state.position)

    def loss(self, ids: Tensor, loss_mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of the supervised tokens, with sleep between the chunks (Algorithm 1 of arXiv 2605.26099).

        Arguments and errors are those of `answers`.
        """
        return self.answers(ids, loss_mask, cu_seqlens=cu_seqlens).losses().mean()

    def answers(
        self,
        ids: Tensor,
        loss_mask: Tensor,
        *,
        loops: int | None = None,
        recompute: Recompute = "nothing",
        backward_chunks: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Answers:
        """Return the predictions of the supervised tokens, which `loss` averages. `zoo.loss.chunks` says which chunks sleep.

        The first token of a chunk is predicted from the previous chunk if that was awake. After a sleep, and at the start of the
        stream, there is no prediction for it, and it carries no loss.

        Args:
            ids: [B, T] int64.
            loss_mask: [B, T], bool or 0 and 1: true where a token must be predicted from those before it.
            loops: passes per sleep, default `config.loops`.
            recompute: activations to recompute in the backward pass. "passes" stores hidden states between passes and the
                activations of one pass; "chunks" stores the state at the start of each chunk, at the cost of two more forward passes.
            backward_chunks: truncate gradients to groups of this many chunks, counted from the last; default: no truncation.
            cu_seqlens: as in `forward`. Each sequence is a stream of its own, cut at multiples of the window from its first token.
        Raises:
            ZooError: shapes that differ, a mask that is not bool or 0 and 1, negative ids, no token that can be predicted, `cu_seqlens`
                that does not fit, or a model with several loops that would never sleep.
        """
        return answers(self, ids, loss_mask, loops=loops, recompute=recompute, backward_chunks=backward_chunks, cu_seqlens=cu_seqlens)

    def embedded(self, ids: Tensor, positions: Positions, *, asleep: bool = False) -> Tensor:
        """Embed tokens and, where the model has them, their learned positions: ids [B, T] -> [B, T, D]."""
        h = inputs.look_up(self.embed, ids)
        h = h if self.config.embed_scale == 1 else h * self.config.embed_scale
        if self.config.learned_positions and (asleep or self.config.learned_positions != "asleep"):
            # the padding of an exported graph may reach past the window
            h = h + self.positions(positions.position.clamp(max=self.positions.num_embeddings - 1))
        dtype = self.residual_dtype
        return h if h.dtype == dtype else h.to(torch.promote_types(h.dtype, dtype))

    def between_passes(self, h: Tensor, first: Tensor) -> Tensor:
        """Turn the output h: [B, T, D] of a pass into the input of the next; `first` is the span's input in the first pass."""
        if not self.config.feed_back:
            return first
        if self.config.loop_norm:
            h = self.norm(h)
        if self.config.inject == "bounded":
            return h + self.inject.sigmoid() * (first - h)
        if self.config.inject:
            h = h + self.inject * first
        return h

    def gated(self, h: Tensor, entered: Tensor, n: int | Tensor) -> Tensor:
        """Add the input of pass n, times its residual gate, to its output h: [B, T, D] (arXiv 2605.20670)."""
        if not (gates := self.config.residual_gates):
            return h
        return h + self.residual_gates[min(n, gates - 1) if isinstance(n, int) else n.clamp(max=gates - 1)] * entered

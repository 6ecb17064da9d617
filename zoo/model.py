"""The model: one wake pass, one sleep, and the loss that trains both. Shapes: B streams, T tokens, D width, V words."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from copy import copy
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from zoo.blocks.block import Block
from zoo.blocks.exit import ExitGate
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.norm import RMSNorm, norms
from zoo.blocks.steps import Steps
from zoo.config import ModelConfig, validate
from zoo.eviction import evictions
from zoo.kernels import packed
from zoo.kernels.registry import ZooError

T = TypeVar("T")
Recompute = Literal["nothing", "passes", "chunks"]
Bits = Generator[None, int | None, T]
"""A computation bit by bit: yields before every bit, and is sent how many tokens of a row it may take (None: any number)."""


class State(NamedTuple):
    """All that a stream carries. Never changed in place: a pass returns a new one."""

    fast: tuple[Tensor | None, ...]
    """Fast weights S of each layer, float32 (float64 in a float64 model); None where the mixer has none."""
    window: tuple[Any, ...]
    """Window cache of each layer, a NamedTuple of tensors; with wake loops, of each loop's layers in turn."""
    position: int | Tensor
    """Position of the next token: in the window under `hard`, in the stream otherwise. After packed sequences, that of each
    stream, int64 [S]."""


class Output(NamedTuple):
    logits: Tensor
    """[B, T, V]"""
    state: State


class Answers(NamedTuple):
    """Predictions of the supervised tokens of a batch, in no particular order."""

    logits: Tensor
    """[n, V]"""
    place: Tensor
    """[n], where each token stands in ids.flatten()"""
    target: Tensor
    """[n], the token itself"""

    def losses(self) -> Tensor:
        """Cross-entropy of each, [n], in float32 or wider."""
        return F.cross_entropy(self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)), self.target, reduction="none")

    def right(self) -> Tensor:
        """Whether the likeliest token is the right one, bool [n]."""
        return self.logits.argmax(-1) == self.target


class Model(nn.Module):
    """A hybrid language model that sleeps. Make one with `zoo.create`.

    Raises:
        ZooError: a kind of block or an option that does not exist or does not fit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.eviction = evictions.get(config.evict)(config.window)
        self.embed = _embedding(config.vocab_size, config.d_model)
        if config.learned_positions:
            if not self.eviction.restarts:
                raise ZooError(f"{config.name}: learned_positions: windows under evict '{config.evict}' do not restart; allowed: hard")
            self.positions = _embedding(config.window or 0, config.d_model)
        self.blocks = nn.ModuleList(_build_blocks(config, self.eviction.reach))
        self.norm = norms[config.norm](config.d_model, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.exit = None if config.exit is None else ExitGate(config.d_model, **config.exit.model_dump())
        if config.inject:
            self.inject = nn.Parameter(torch.empty(config.d_model))
        if config.wake_loops > 1 and any(fast is not None for fast in self.init_state().fast):
            raise ZooError(f"{config.name}: wake_loops: {config.wake_loops} needs blocks without fast weights, which read ahead")
        if self.eviction.restarts and all(fast is None for fast in self.init_state().fast):
            raise ZooError(f"{config.name}: evict: '{config.evict}' empties the window, and no block of '{config.layers}' has fast weights")
        self.prelude = range(config.looped.start)
        self.span = config.looped
        self.coda = range(config.looped.stop, len(self.blocks))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, inserted_only: bool = False) -> None:
        """Set every parameter, or only those of inserted blocks and injection.

        Normal weights of deviation fan_in^-0.5, block outputs smaller by sqrt(number of residual branches).
        What is inserted into a trained model starts by adding nothing.
        """
        branches = sum(1 if block.mlp is None else 2 for block in self.blocks)
        # children first: a mixer has the last word on its projections
        chosen = [block for block in self.blocks if block.inserted] if inserted_only else [self]
        for name, module in reversed([named for part in chosen for named in part.named_modules()]):
            if isinstance(module, Block):
                if module.inserted:
                    nn.init.zeros_(module.mixer.get_parameter("o_proj.weight"))
            elif isinstance(module, Mixer):
                module.init_weights(generator)
            elif isinstance(module, nn.Linear):
                scale = branches**-0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                # a token and its place start apart in size, so that neither hides the other
                std = 0.5 if name == "positions" else self.config.d_model**-0.5 if self.config.tie_embeddings else 1.0
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.constant_(module.weight, module.neutral)
        if self.config.inject:
            nn.init.constant_(self.inject, 0.0 if inserted_only else 1.0)

    def init_state(self, batch_size: int = 1) -> State:
        """The state of `batch_size` streams before their first token."""
        layers: list[Mixer] = [block.mixer for block in self.blocks]  # type: ignore[misc]
        window = tuple(m.new_window(batch_size) for _ in range(self.config.wake_loops) for m in layers)
        return State(tuple(m.new_fast(batch_size) for m in layers), window, 0)

    def forward(self, ids: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None) -> Output:
        """One wake pass over ids: [B, T] int64, continuing the stream at `state` (default: a new stream).

        Args:
            cu_seqlens: [S + 1] int32 or int64: ids is [1, total], S sequences end to end, each continuing a stream of its own;
                sequence s is tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
        Raises:
            ZooError: the tokens do not fit into the window that the state has open.
            ValueError: `cu_seqlens` does not fit the tokens.
        """
        h, state = self.wake(ids, state, cu_seqlens=cu_seqlens)
        return Output(self.logits(h), state)

    def wake(self, ids: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        """`forward` up to the last block: its hidden states [B, T, D] ([B, T, loops, D] with wake loops) and the state."""
        return self._awake(ids, state, cu_seqlens).finish()

    def waking(self, ids: Tensor, state: State | None = None) -> Bits[Output]:
        """`forward` bit by bit, so that something else may go first."""
        passes = self._awake(ids, state)
        yield from passes.bits()
        h, state = passes.finish()
        logits = yield from _by_bits(h.shape[1], lambda first, last: self.logits(h[:, first:last]))
        return Output(logits, state)

    def logits(self, h: Tensor) -> Tensor:
        """Final norm and head: h [..., D] -> [..., V]; with wake loops, h [..., loops, D] holds the states after each."""
        h = self.norm(h)
        if self.config.wake_loops > 1:
            h = h[..., -1, :] if self.exit is None else self.exit(h)
        return F.linear(h, self.embed.weight if self.head is None else self.head.weight)

    @property
    def wakes_as_it_sleeps(self) -> bool:
        """Whether the first pass asleep is the wake pass: all blocks are looped asleep and once awake, over the same embeddings."""
        return len(self.span) == len(self.blocks) and self.config.wake_loops == 1 and self.config.learned_positions != "asleep"

    def consolidate(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        loops: int | None = None,
        cu_seqlens: Tensor | None = None,
        awake: tuple[Tensor, State] | None = None,
    ) -> State:
        """Sleep on one whole chunk, then evict.

        Runs the prelude once, the span `loops` times and the coda once. Each pass reads the last one's hidden
        states and carries S on; each starts from the window cache as it stood at the chunk's start.

        Args:
            ids: the chunk's tokens, [B, T] int64, T at most the window.
            state: as it stood at the chunk's start (default: a new stream). It is not changed.
            loops: passes of the span, default `config.loops`.
            cu_seqlens: as in `forward`; every sequence is one whole chunk.
            awake: what `wake` gave for these tokens and this state, where `wakes_as_it_sleeps`: one pass less to run.
        Raises:
            ZooError: more tokens than the window holds, loops < 1, or `awake` of a model whose wake pass is no pass of a sleep.
            ValueError: `cu_seqlens` does not fit the tokens.
        """
        return self.evict(self._asleep(ids, state, loops, cu_seqlens, awake).finish()[1])

    def consolidation(
        self, ids: Tensor, state: State | None = None, *, loops: int | None = None, awake: tuple[Tensor, State] | None = None
    ) -> Bits[State]:
        """`consolidate` bit by bit."""
        passes = self._asleep(ids, state, loops, awake=awake)
        yield from passes.bits()
        return self.evict(passes.finish()[1])

    def _asleep(
        self,
        ids: Tensor,
        state: State | None,
        loops: int | None,
        cu_seqlens: Tensor | None = None,
        awake: tuple[Tensor, State] | None = None,
    ) -> Passes:
        loops = self.config.loops if loops is None else loops
        if loops < 1:
            raise ZooError(f"loops: {loops} must be at least 1")
        if self.config.window is not None and (longest := _longest(ids, cu_seqlens)) > self.config.window:
            raise ZooError(f"ids: {longest} tokens are more than one window of {self.config.window}")
        state, steps = self._open(ids, state, cu_seqlens)
        passes = Passes(self, self.embedded(ids, steps, asleep=True), state, steps, loops * self.config.wake_loops)
        if awake is not None:
            if not self.wakes_as_it_sleeps:
                raise ZooError(f"awake: {self.config.name} does not read awake as in its first pass asleep; give no `awake`")
            passes.skip_first(*awake)
        return passes

    def evict(self, state: State) -> State:
        """The state after the eviction that ends a chunk."""
        window = tuple(None if cache is None else self.eviction.evict(cache) for cache in state.window)
        return State(state.fast, window, 0 if self.eviction.restarts else state.position)

    def loss(self, ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Mean cross-entropy of the supervised tokens, with sleep between the chunks (Algorithm 1 of arXiv 2605.26099).

        Args:
            ids: [B, T] int64. loss_mask: [B, T], true where a token is to be predicted from the one before it.
        Raises:
            ZooError: as `answers`.
        """
        return self.answers(ids, loss_mask).losses().mean()

    def answers(
        self,
        ids: Tensor,
        loss_mask: Tensor,
        *,
        loops: int | None = None,
        recompute: Recompute = "nothing",
        backward_chunks: int | None = None,
    ) -> Answers:
        """What `loss` scores: the stream is cut at multiples of the window; a chunk without loss is consolidated,
        a chunk with loss gets one wake pass. Under `sleep_on: every`, each chunk gets a wake pass for its loss and is
        then consolidated from its start. Gradients cross chunks through the state alone.

        The first token of a chunk is predicted from the chunk before, if that was awake; after a sleep (and at the
        start of the stream) nothing predicts it, and it carries no loss.

        Args:
            loops: passes per sleep, default `config.loops`.
            recompute: activations that the backward pass makes again, to save memory. "passes": what is kept is the hidden
                states between passes, and the activations of one pass. "chunks": of each chunk only the state at its start is
                kept, and while the backward pass is at a chunk, what "passes" keeps of that one; two more forward passes.
            backward_chunks: gradients stay within groups of so many chunks, counted from the last; default: all.
        Raises:
            ZooError: shapes that differ, no token that can be predicted, or rows that disagree on which chunks
                carry loss (they would have to sleep at different times).
        """
        if ids.shape != loss_mask.shape or ids.ndim != 2:
            raise ZooError(f"loss_mask {list(loss_mask.shape)} and ids {list(ids.shape)}: want the same [B, T]")
        every = self.config.sleep_on == "every"
        index = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        hidden, found = [], []
        state, before = self.init_state(ids.shape[0]), None
        chunks = list(self._chunks(ids, index, loss_mask.bool()))
        for number, (chunk, place, mask) in enumerate(chunks):
            with_loss = mask.any(dim=1)
            if not every and bool(with_loss.any()) != bool(with_loss.all()):
                raise ZooError(f"loss_mask: some rows have loss in chunk {number} and others do not; such rows sleep at different times")
            if backward_chunks is not None and (len(chunks) - number) % backward_chunks == 0:
                state = tree_map_only(Tensor, Tensor.detach, state)
            if every or with_loss.any():
                h, after = self._awake(chunk, state).finish(recompute=recompute != "nothing")
                source = h[:, :-1] if before is None else torch.cat([before, h[:, :-1]], dim=1)
                targets = slice(h.shape[1] - source.shape[1], None)
                hidden.append(source[mask[:, targets]])
                found.append(place[:, targets][mask[:, targets]])
                before = h[:, -1:]
            else:
                before = None
            if number + 1 < len(chunks):
                asleep = every or before is None
                if not asleep:
                    state = self.evict(after)
                elif every and self.wakes_as_it_sleeps and recompute != "chunks":
                    state = self._consolidated(chunk, state, loops, recompute, awake=(h, after))
                else:
                    state = self._consolidated(chunk, state, loops, recompute)
        if not sum(len(place) for place in found):
            raise ZooError("loss_mask: marks no token that can be predicted (the first of a stream, or after a sleep, cannot)")
        where = torch.cat(found)
        return Answers(self.logits(torch.cat(hidden)), where, ids.flatten()[where])

    def _consolidated(
        self, ids: Tensor, state: State, loops: int | None, recompute: Recompute, awake: tuple[Tensor, State] | None = None
    ) -> State:
        """`consolidate`, keeping for the backward pass what `recompute` says."""
        if recompute == "chunks":
            return checkpoint(self._consolidated, ids, state, loops, "passes", use_reentrant=False)
        return self.evict(self._asleep(ids, state, loops, awake=awake).finish(recompute=recompute == "passes")[1])

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        width = self.config.window or tensors[0].shape[1]
        return zip(*(tensor.split(width, dim=1) for tensor in tensors), strict=True)

    def _awake(self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None = None) -> Passes:
        state, steps = self._open(ids, state, cu_seqlens)
        return Passes(self, self.embedded(ids, steps), state, steps, self.config.wake_loops)

    def _open(self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[State, Steps]:
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ZooError(f"ids {list(ids.shape)}: want [B, T] with at least one token")
        streams = packed.streams(ids.shape[0], ids.shape[1], cu_seqlens)
        if cu_seqlens is not None and (loose := {kind for kind in self.config.pattern if not mixers.get(kind).packs}):
            raise ZooError(f"{self.config.name}: cu_seqlens: block '{min(loose)}' cannot keep packed sequences apart")
        state = self.init_state(streams) if state is None else state
        steps = Steps(state.position, ids.shape[1], ids.device, cu_seqlens=cu_seqlens)
        end = int(steps.end.max()) if isinstance(steps.end, Tensor) else steps.end
        if self.eviction.restarts and end > (window := self.config.window or 0):
            given = _longest(ids, cu_seqlens)
            raise ZooError(f"ids: {given} tokens do not fit into a window of {window} that holds {state.position}; consolidate it first")
        return state, steps

    def embedded(self, ids: Tensor, steps: Steps, *, asleep: bool = False) -> Tensor:
        """What the first block reads: ids [B, T] -> [B, T, D]."""
        h = self.embed(ids)
        if not self.config.learned_positions or (self.config.learned_positions == "asleep" and not asleep):
            return h
        # the padding of an exported graph may reach past the window
        return h + self.positions(steps.position.clamp(max=self.positions.num_embeddings - 1))

    def between_passes(self, h: Tensor, first: Tensor) -> Tensor:
        """What one pass hands to the next: h: [B, T, D], and optionally the span's first input again."""
        if self.config.loop_norm:
            h = self.norm(h)
        if self.config.inject:
            h = h + self.inject * first
        return h


def _longest(ids: Tensor, cu_seqlens: Tensor | None) -> int:
    """Tokens of the longest sequence."""
    return ids.shape[-1] if cu_seqlens is None else int(cu_seqlens.diff().max())


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Without the usual initial values, which on the meta device take seconds of imports."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Passes:
    """Embedded tokens h: [B, T, D] on their way through prelude, `loops` passes of the span, and coda: one block at a time."""

    def __init__(self, model: Model, h: Tensor, state: State, steps: Steps, loops: int) -> None:
        self.model, self.h, self.start, self.steps = model, h, state, steps
        self.fast, self.window = list(state.fast), list(state.window)
        self.after: list[Tensor] = []
        self.first: Tensor | None = None
        """What the span read first."""
        span = [(n, i) for n in range(loops) for i in model.span]
        self.stages = [*((0, i) for i in model.prelude), *span, *((0, i) for i in model.coda)]
        """Pass and block, in order."""
        self._done = 0
        self._parts = {(0, steps.length): steps}

    def skip_first(self, h: Tensor, after: State) -> None:
        """Take the first pass as run: it came to h and this state."""
        self.first, self.h = self.h, h
        self.fast, self.window = list(after.fast), list(after.window)
        self._done = len(self.model.span)

    def run(self, n: int, i: int) -> None:
        """Block i in pass n: the next of `stages`."""
        at = self._begin(n, i)
        self.h, self.fast[i], self.window[at] = self.model.blocks[i](self.h, self.fast[i], self.start.window[at], self.steps)
        self._end(i)

    def bits(self) -> Bits[None]:
        """All that is left of `stages`, a block over some of the tokens at a time: each continues the stream of the ones before."""
        for n, i in self.stages[self._done :]:
            at = self._begin(n, i)
            self.window[at] = self.start.window[at]
            self.h = yield from _by_bits(self.steps.length, partial(self._part, i, at, self.h))
            self._end(i)

    def _part(self, i: int, at: int, h: Tensor, first: int, last: int) -> Tensor:
        """Block i over the tokens first .. last - 1 of h."""
        if (first, last) not in self._parts:
            self._parts[first, last] = Steps(self.steps.start + first, last - first, h.device)
        h, self.fast[i], self.window[at] = self.model.blocks[i](h[:, first:last], self.fast[i], self.window[at], self._parts[first, last])
        return h

    def _begin(self, n: int, i: int) -> int:
        """What stands between passes, before block i; the place of its window cache."""
        model = self.model
        if i == model.span.start:
            if n == 0:
                self.first = self.h
            else:
                assert self.first is not None
                self.h = model.between_passes(self.h, self.first)
        if n and not model.config.carry:
            self.fast[i] = self.start.fast[i]
        return n % model.config.wake_loops * len(model.blocks) + i

    def _end(self, i: int) -> None:
        if self.model.config.wake_loops > 1 and i == self.model.span.stop - 1:
            self.after.append(self.h)
        self._done += 1

    def finish(self, *, recompute: bool = False) -> tuple[Tensor, State]:
        """Whatever is left to run; then the hidden states [B, T, D] ([B, T, loops, D] with wake loops) and the state.

        Args:
            recompute: keep the activations of no pass for the backward pass, which makes them again.
        """
        for _, stages in groupby(self.stages[self._done :], key=lambda stage: stage[0]):
            if recompute:
                self._run_and_forget(tuple(stages))
            else:
                for stage in stages:
                    self.run(*stage)
        h = torch.stack(self.after, dim=-2) if self.after else self.h
        return h, State(tuple(self.fast), tuple(self.window), self.steps.end)

    def _run_and_forget(self, stages: tuple[tuple[int, int], ...]) -> None:
        """`run` all these, as a function of h, the span's first input and the fast weights, of which alone something is kept."""

        bare = copy(self)
        bare.h, bare.first, bare.fast, bare.window, bare.after = self.h.new_empty(0), None, [], [], []

        def forward(h: Tensor, first: Tensor | None, *fast: Tensor | None) -> Passes:
            part = copy(bare)
            part.h, part.first, part.fast, part.window, part.after = h, first, list(fast), list(bare.start.window), []
            for stage in stages:
                part.run(*stage)
            return part

        part = checkpoint(forward, self.h, self.first, *self.fast, use_reentrant=False)
        self.h, self.first, self.fast = part.h, part.first, part.fast
        self.after += part.after
        for n, i in stages:
            at = n % self.model.config.wake_loops * len(self.model.blocks) + i
            self.window[at] = part.window[at]
        self._done += len(stages)


def _by_bits(tokens: int, run: Callable[[int, int], Tensor]) -> Bits[Tensor]:
    """`run(first, last)` over the tokens first .. last - 1 until all have had their turn: its results [B, T, ...] in a row."""
    results, last = [], 0
    while last < tokens:
        most = yield
        first, last = last, tokens if most is None else min(last + most, tokens)
        results.append(run(first, last))
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


def _build_blocks(config: ModelConfig, reach: int | None) -> Iterator[Block]:
    options = {}
    for kind, fields in {**{kind: {} for kind in config.pattern}, **config.blocks}.items():
        options[kind] = validate(mixers.get(kind).Options, fields, f"{config.name}: blocks.{kind}")
    norm = partial(norms[config.norm], eps=config.norm_eps)
    for kind in config.pattern:
        mixer = mixers.get(kind)(config.d_model, options[kind], reach)
        yield Block(mixer, options[kind], config.d_model, config.mlp_width, norm)

"""The model: one wake pass, one sleep, and the loss that trains both. Shapes: B streams, T tokens, D width, V words."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from zoo.blocks.block import Block
from zoo.blocks.exit_gate import ExitGate
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.norm import RMSNorm, norms
from zoo.blocks.positions import Positions
from zoo.config import ModelConfig, validate
from zoo.errors import ZooError
from zoo.eviction import evictions
from zoo.kernels.common import packed
from zoo.state import Answers, Output, State

Recompute = Literal["nothing", "passes", "chunks"]


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
        return self._awake(ids, state, cu_seqlens)

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
        return self._asleep(ids, state, loops, cu_seqlens, awake)

    def _asleep(
        self,
        ids: Tensor,
        state: State | None,
        loops: int | None,
        cu_seqlens: Tensor | None = None,
        awake: tuple[Tensor, State] | None = None,
        recompute: bool = False,
    ) -> State:
        h, state, positions, loops = self.fall_asleep(ids, state, loops, cu_seqlens, awake)
        return self.evict(self.run(h, state, positions, loops * self.config.wake_loops, awake=awake, recompute=recompute)[1])

    def fall_asleep(
        self,
        ids: Tensor,
        state: State | None,
        loops: int | None,
        cu_seqlens: Tensor | None = None,
        awake: tuple[Tensor, State] | None = None,
    ) -> tuple[Tensor, State, Positions, int]:
        """What a sleep starts from: embedded tokens, state, positions and the number of passes. Raises ZooError, as `consolidate`."""
        loops = self.config.loops if loops is None else loops
        if loops < 1:
            raise ZooError(f"loops: {loops} must be at least 1")
        if self.config.window is not None and (longest := _longest(ids, cu_seqlens)) > self.config.window:
            raise ZooError(f"ids: {longest} tokens are more than one window of {self.config.window}")
        if awake is not None and not self.wakes_as_it_sleeps:
            raise ZooError(f"awake: {self.config.name} does not read awake as in its first pass asleep; give no `awake`")
        state, positions = self._open(ids, state, cu_seqlens)
        return self.embedded(ids, positions, asleep=True), state, positions, loops

    def run(
        self,
        h: Tensor,
        state: State,
        positions: Positions,
        passes: int,
        *,
        awake: tuple[Tensor, State] | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, State]:
        """h [B, T, D] through the prelude, `passes` passes of the span, and the coda.

        Each pass reads the hidden states of the last one and writes on in its fast weights, but starts from the window cache of `state`.

        Args:
            awake: the first pass, already run: it came to these hidden states and this state.
            recompute: keep no activation of a pass for the backward pass, which makes them again.
        Returns:
            Hidden states [B, T, D] ([B, T, passes, D] with wake loops) and the state after the tokens.
        """
        first, after = h, []
        fast, window = (list(state.fast), list(state.window)) if awake is None else (list(awake[1].fast), list(awake[1].window))
        h = h if awake is None else awake[0]
        one_pass = partial(checkpoint, self._pass, use_reentrant=False) if recompute else self._pass
        for n in range(0 if awake is None else 1, passes):
            h, first, fast, caches = one_pass(n, n == passes - 1, state, positions, h, first, *fast)
            for at, cache in caches.items():
                window[at] = cache
            after.append(h)
        h = torch.stack(after, dim=-2) if self.config.wake_loops > 1 else h
        return h, State(tuple(fast), tuple(window), positions.end)

    def _pass(
        self, n: int, last: bool, start: State, positions: Positions, h: Tensor, first: Tensor, *carried: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor | None], dict[int, Any]]:
        """The span once; before the first pass the prelude, after the last one the coda. `checkpoint` wants the tensors one by one."""
        fast, window = list(carried), {}
        for i in (*(self.prelude if n == 0 else ()), *self.span, *(self.coda if last else ())):
            if i == self.span.start:
                first, h = (h, h) if n == 0 else (first, self.between_passes(h, first))
            if n and not self.config.carry and i in self.span:
                fast[i] = start.fast[i]
            at = n % self.config.wake_loops * len(self.blocks) + i
            h, fast[i], window[at] = self.blocks[i](h, fast[i], start.window[at], positions)
        return h, first, fast, window

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
                h, after = self._awake(chunk, state, recompute=recompute != "nothing")
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
        return self._asleep(ids, state, loops, awake=awake, recompute=recompute == "passes")

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        width = self.config.window or tensors[0].shape[1]
        return zip(*(tensor.split(width, dim=1) for tensor in tensors), strict=True)

    def _awake(
        self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None = None, *, recompute: bool = False
    ) -> tuple[Tensor, State]:
        state, positions = self._open(ids, state, cu_seqlens)
        return self.run(self.embedded(ids, positions), state, positions, self.config.wake_loops, recompute=recompute)

    def _open(self, ids: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[State, Positions]:
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ZooError(f"ids {list(ids.shape)}: want [B, T] with at least one token")
        streams = packed.streams(ids.shape[0], ids.shape[1], cu_seqlens)
        if cu_seqlens is not None and (loose := {kind for kind in self.config.pattern if not mixers.get(kind).packs}):
            raise ZooError(f"{self.config.name}: cu_seqlens: block '{min(loose)}' cannot keep packed sequences apart")
        state = self.init_state(streams) if state is None else state
        positions = Positions(state.position, ids.shape[1], ids.device, cu_seqlens=cu_seqlens)
        end = int(positions.end.max()) if isinstance(positions.end, Tensor) else positions.end
        if self.eviction.restarts and end > (window := self.config.window or 0):
            given = _longest(ids, cu_seqlens)
            raise ZooError(f"ids: {given} tokens do not fit into a window of {window} that holds {state.position}; consolidate it first")
        return state, positions

    def embedded(self, ids: Tensor, positions: Positions, *, asleep: bool = False) -> Tensor:
        """What the first block reads: ids [B, T] -> [B, T, D]."""
        h = self.embed(ids)
        if not self.config.learned_positions or (self.config.learned_positions == "asleep" and not asleep):
            return h
        # the padding of an exported graph may reach past the window
        return h + self.positions(positions.position.clamp(max=self.positions.num_embeddings - 1))

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


def _build_blocks(config: ModelConfig, reach: int | None) -> Iterator[Block]:
    options = {}
    for kind, fields in {**{kind: {} for kind in config.pattern}, **config.blocks}.items():
        options[kind] = validate(mixers.get(kind).Options, fields, f"{config.name}: blocks.{kind}")
    norm = partial(norms[config.norm], eps=config.norm_eps)
    for kind in config.pattern:
        mixer = mixers.get(kind)(config.d_model, options[kind], reach)
        yield Block(mixer, options[kind], config.d_model, config.mlp_width, norm)

"""Checks that every registered mixer must pass. Registering a mixer is enough to have it tested, with its default options.

ZOO_MIXERS names the kinds to test, separated by spaces, for example one that another package registers:

    ZOO_MIXERS=decay pytest tests/blocks/test_conformance.py
"""

import math
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.blocks.attention import KV
from zoo.blocks.growing import SPARE
from zoo.blocks.mixer import Mixer, mixers, parts
from zoo.blocks.positions import Positions
from zoo.products import set_precision

CPU = torch.device("cpu")
D = 32
KINDS = os.environ.get("ZOO_MIXERS", "").split() or mixers.names()
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in sorted({*mixers.names(), *KINDS})},
    "attn gated": ("attn", {"kv_heads": 2, "head_dim": 12, "rotary": 0.5, "bias": True, "qk_norm": "centred", "gate": True}),
    "attn without positions": ("attn", {"rotary": 0}),
    "swa of 5": ("swa", {"window": 5, "kv_heads": 1}),
    "swa of 1": ("swa", {"window": 1}),
    "gdn grouped": (
        "gdn",
        {"heads": 2, "head_dim": 6, "value_heads": 4, "expand_v": 1.5, "gate": False, "neg_eigval": True, "conv_size": 2},
    ),
    "jet narrow": ("jet", {"heads": 3, "head_dim": 5, "expand_v": 1.4, "conv_size": 3, "generator_reduction": 4}),
    "attn scaled": ("attn", {"kv_heads": 2, "scale": 0.3, "qk_norm": "wide", "qk_norm_whole": True}),
    "mla wide": ("mla", {"heads": 3, "rank": 10, "head_dim": 6, "shared_dim": 3, "value_dim": 7, "bias": True}),
    "mamba normed": ("mamba", {"state_dim": 5, "inner_norm": "plain"}),
    "mamba unit": ("mamba", {"state_dim": 5, "inner_norm": "unit"}),
    "rglru wide": ("rglru", {"heads": 3, "width": 48, "conv_size": 3}),
    "conv of 2": ("conv", {"conv_size": 2, "bias": True}),
    "mamba odd": ("mamba", {"expand": 3, "state_dim": 5, "dt_rank": 3, "conv_size": 3, "conv_bias": False, "bias": True}),
    "mamba2 grouped": ("mamba2", {"head_dim": 8, "state_dim": 5, "groups": 4, "conv_size": 3, "bias": True, "dt_limit": [0.01, 0.5]}),
    "mamba2 scaled": ("mamba2", {"heads": 3, "head_dim": 6, "groups": 3, "norm": "before_gate", "scales": [0.5, 0.8, 1.2, 0.7, 1.5]}),
    "parallel scaled": (
        "parallel",
        {
            **{"attn": {"kv_heads": 2, "head_dim": 12, "bias": True}, "attn_in_scale": 0.7, "attn_out_scale": 1.3},
            **{"mamba2": {"heads": 3, "head_dim": 6, "state_dim": 5, "norm": None, "o_bias": True}, "mamba2_in_scale": 1.4},
            "mamba2_out_scale": 0.6,
        },
    ),
}


def make(variant: str, **fields: Any) -> zoo.Model:
    kind, options = VARIANTS[variant]
    config = {"name": variant, "vocab_size": 17, "d_model": D, "layers": kind, "blocks": {kind: options}}
    return zoo.create(config, dtype=torch.float64, **fields)


@pytest.fixture(params=[name for name, (kind, _) in VARIANTS.items() if kind in KINDS])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def mixer(variant: str) -> Mixer:
    return make(variant).blocks[0].mixer


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(mixer: Mixer, x: torch.Tensor, pieces: list[int] | None = None) -> tuple[torch.Tensor, Any, Any]:
    fast, window, at, outputs = mixer.new_fast(len(x)), mixer.new_window(len(x)), 0, []
    for piece in x.split(pieces or [x.shape[1]], dim=1):
        y, fast, window = mixer(piece, fast, window, Positions(at, piece.shape[1], CPU))
        at += piece.shape[1]
        outputs.append(y)
    return torch.cat(outputs, dim=1), fast, window


def tensors(cache: Any) -> list[torch.Tensor]:
    return [x for part in parts(cache) for x in part]


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_prefill_cut_anywhere(mixer: Mixer) -> None:
    x = tokens(2, 12)
    whole = run(mixer, x)
    assert whole[0].abs().max() > 1e-3
    for cut in range(1, 12):
        assert_same(run(mixer, x, [cut, 12 - cut]), whole)


@torch.no_grad()
def test_decode_is_prefill(mixer: Mixer) -> None:
    x = tokens(2, 70)  # longer than a chunk of any operator
    assert_same(run(mixer, x, [1] * 70), run(mixer, x))


@torch.no_grad()
def test_a_state_continues_two_ways(mixer: Mixer) -> None:
    x = tokens(2, 9)
    other = torch.cat([x[:, :6], tokens(2, 3, seed=1)], dim=1)
    _, *state = run(mixer, x[:, :6], [1] * 6)
    for whole in (x, other, x):
        want, now = run(mixer, whole), state
        for t in range(6, 9):
            y, *now = mixer(whole[:, t : t + 1], *now, Positions(t, 1, CPU))
            assert_same(y[:, 0], want[0][:, t])
        assert_same(now, list(want[1:]))


@torch.no_grad()
def test_no_token_sees_the_future(mixer: Mixer) -> None:
    x, changed = tokens(1, 9), tokens(1, 9)
    changed[:, 6:] += 1
    before, after = run(mixer, x)[0], run(mixer, changed)[0]
    assert_same(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 6:], before[:, 6:])


@torch.no_grad()
def test_rows_are_independent(mixer: Mixer) -> None:
    x = tokens(3, 10)
    y, fast, _ = run(mixer, x)
    for row in range(3):
        alone, alone_fast, _ = run(mixer, x[row : row + 1])
        assert_same(alone, y[row : row + 1])
        if fast is not None:
            assert_same(alone_fast, fast[row : row + 1])


@torch.no_grad()
def test_state_size(mixer: Mixer) -> None:
    """A KV cache grows up to the mixer's reach; every other state keeps its size."""
    _, fast, window = run(mixer, tokens(1, 20))
    for length in (0, 1, 7, 20):
        cache = run(mixer, tokens(1, length))[2] if length else mixer.new_window(1)
        assert mixer.window_bytes(length) == sum(x.nbytes for x in tensors(cache))
    for part, new in zip(parts(window), parts(mixer.new_window(1)), strict=True):
        if isinstance(part, KV):
            kept = 20 if mixer.reach is None else min(20, mixer.reach - 1)
            assert part.key.shape[2] == part.value.shape[2] == kept
        else:
            assert [x.shape for x in part] == [x.shape for x in new]
    if fast is not None:
        assert fast.shape == mixer.new_fast(1).shape
        assert fast.count_nonzero() > 0


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[20], [20, 1], [7, 13]])
def test_a_state_holds_little_memory_but_its_own(mixer: Mixer, pieces: list[int]) -> None:
    """No tensor is a view of a much larger one, even after earlier tokens were read or dropped."""
    _, fast, window = run(mixer, tokens(2, sum(pieces)), pieces)
    assert fast is None or fast.untyped_storage().nbytes() == fast.nbytes
    for cache in () if window is None else (window, window.empty(), window.keep(6), window.keep(3).keep(2)):
        for part in parts(cache):
            for x in part:
                growing = isinstance(part, KV) and x.numel()
                assert x.untyped_storage().nbytes() <= (2 * (x.shape[2] + SPARE) * x[:, :, :1].nbytes if growing else x.nbytes)


@torch.no_grad()
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 9), (6, 0), (6, 9)])
def test_flops(mixer: Mixer, length: int, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flops` equals what the step recurrence multiplies: matrix products, and outer products written as one `addcmul`."""
    monkeypatch.setattr("zoo.blocks.attention.rotate", lambda x, cos, sin: x)  # rotations do not count
    _, fast, window = run(mixer, tokens(1, past)) if past else (None, mixer.new_fast(1), mixer.new_window(1))
    # torch counts the products of attention on a CPU only in this form
    with sdpa_kernel(SDPBackend.MATH), zoo.kernels.use("reference"), FlopCounterMode(display=False, custom_mapping=ADDCMUL) as counter:
        mixer(tokens(1, length), fast, window, Positions(past, length, CPU))
    assert counter.get_total_flops() > 0
    assert mixer.flops(length, past) == counter.get_total_flops()


def multiply_adds(*_: Any, out_shape: Any = None, out_val: Any = None, **__: Any) -> int:
    return 2 * math.prod(out_shape)


ADDCMUL = {torch.ops.aten.addcmul: multiply_adds, torch.ops.aten.addcmul_: multiply_adds}


def test_inputs_are_not_changed(mixer: Mixer) -> None:
    x = tokens(2, 5)
    _, fast, window = run(mixer, x)
    before = [x.clone() for x in (*tensors(window), *([] if fast is None else [fast]))]
    with torch.no_grad():
        mixer(x, fast, window, Positions(5, 5, CPU))
    assert_same([*tensors(window), *([] if fast is None else [fast])], before)


def test_gradients(mixer: Mixer) -> None:
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    fast, window = mixer.new_fast(2), mixer.new_window(2)
    start = [] if fast is None else [torch.randn_like(fast).requires_grad_()]

    def outputs(x: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        weights = dict(zip(names, rest[len(start) :], strict=True))
        y, new, _ = torch.func.functional_call(mixer, weights, (x, rest[0] if start else None, window, Positions(0, 6, CPU)))
        return [y] if new is None else [y, new]

    inputs = (tokens(2, 6).requires_grad_(), *start, *parameters)
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):  # the form of torch's attention that has second derivatives on a CPU
        assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)


def score(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    y, fast, _ = run(mixer, x)
    return y.square().sum() + (0 if fast is None else fast.square().sum())


def test_transforms_of_torch_func(mixer: Mixer) -> None:
    x = tokens(2, 6)
    loss = partial(score, mixer)
    want = [torch.autograd.grad(loss(y.requires_grad_()), y)[0] for y in (x.clone(), 2 * x)]
    assert_same(torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x])), torch.stack(want))
    direction = tokens(2, 6, seed=1)
    assert_same(torch.func.jvp(loss, (x,), (direction,))[1], (want[0] * direction).sum())


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(variant: str, dtype: torch.dtype, precision: str) -> None:
    """Autocast loses at most twice as much as casting the mixer; fast weights stay float32, and every gradient is finite."""
    exact, mixer, cast = (make(variant).blocks[0].mixer.to(to) for to in (torch.float64, torch.float32, dtype))
    x = tokens(2, 7).float()
    with torch.no_grad():
        want = run(exact, x.double())[0]
        error = (run(cast, x.to(dtype))[0] - want).norm()
        with torch.autocast("cpu", dtype), set_precision(precision):
            pieces = run(mixer, x, [5, 1, 1])[0]
    with torch.autocast("cpu", dtype):
        y, fast, _ = run(mixer, x)
    assert y.dtype == dtype
    assert fast is None or fast.dtype == torch.float32
    for got in (y, pieces):
        assert (got - want).norm() <= 2 * error
    score(exact, x.double()).backward()
    y.float().square().sum().backward()
    for name, parameter in mixer.named_parameters():
        if exact.get_parameter(name).grad is not None:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_every_submodule_is_called(variant: str) -> None:
    """Forward hooks fire on every submodule of the block."""
    block, called = make(variant).blocks[0], set()
    names = [name for name, _ in block.named_modules()]
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    block(tokens(1, 3), block.mixer.new_fast(1), block.mixer.new_window(1), Positions(0, 3, CPU))
    assert [name for name in names if name not in called] == []


class Adapter(nn.Module):
    """A Linear with a low-rank update, in the manner of LoRA (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_on_every_linear_gets_a_gradient(variant: str) -> None:
    block = make(variant).blocks[0]
    torch.manual_seed(0)
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            block.set_submodule(name, Adapter(module))
    y, *_ = block(tokens(1, 5), block.mixer.new_fast(1), block.mixer.new_window(1), Positions(0, 5, CPU))
    y.square().sum().backward()
    adapters = [module for module in block.modules() if isinstance(module, Adapter)]
    assert adapters
    assert all(layer.weight.grad.count_nonzero() > 0 for adapter in adapters for layer in (adapter.down, adapter.up))


class UInt8Linear(nn.Module):
    """A Linear whose weight is stored in 8 bits, as a buffer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().add(128).to(torch.uint8))
        self.bias = base.bias

    def dequantised(self) -> torch.Tensor:
        return (self.weight.to(self.scale.dtype) - 128) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_linears_run_in_sessions_and_pools(kind: str) -> None:
    """A model with 8-bit weights equals one with the same weights, rounded; its window caches have the dtype of its activations."""
    config = {"name": kind, "vocab_size": 17, "d_model": D, "d_ff": D, "layers": f"{kind} gdn", "evict": "hard", "window": 8, "loops": 2}
    quantised, rounded = (zoo.create(config, dtype=torch.bfloat16, seed=0) for _ in range(2))
    linears = [name for name, module in rounded.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        quantised.set_submodule(name, replaced := UInt8Linear(rounded.get_submodule(name)))
        rounded.get_submodule(name).weight.copy_(replaced.dequantised())
    assert any(name.startswith("blocks.0.mixer") for name in linears)
    ids = torch.randint(17, (1, 20), generator=torch.Generator().manual_seed(0))
    state = quantised.consolidate(ids[:, :8])
    assert {x.dtype for cache in state.window for x in tensors(cache)} == {torch.bfloat16}
    assert {fast.dtype for fast in state.fast if fast is not None} == {torch.float32}
    alone = list(zoo.Session(rounded).generate(ids, tokens=6))
    assert list(zoo.Session(quantised).generate(ids, tokens=6)) == alone
    with zoo.SessionPool(quantised) as pool:
        assert list(pool.open().generate(ids, tokens=6)) == alone


@torch.no_grad()
@pytest.mark.parametrize("valid", [1, 2, 5, 8])
def test_padding_changes_nothing(mixer: Mixer, valid: int) -> None:
    x, first = tokens(2, 8), tokens(2, 3, seed=1)
    fast, window = run(mixer, first)[1:]
    want, want_fast, want_window = mixer(x[:, :valid], fast, window, Positions(3, valid, CPU))
    got, got_fast, got_window = mixer(x, fast, window, Positions(3, 8, CPU, valid=torch.tensor(valid)))
    assert_same(got[:, :valid], want)
    assert_same(got_fast, want_fast)
    for part, other in zip(parts(got_window), parts(want_window), strict=True):
        if not isinstance(part, KV):  # a KV cache is cut by whoever padded it
            assert_same(part, other)


@torch.no_grad()
def test_fast_weights_stay_float32(variant: str) -> None:
    model = make(variant).to(torch.bfloat16)
    out = model(torch.arange(6)[None])
    assert out.logits.dtype == torch.bfloat16
    assert out.logits.isfinite().all()
    assert all(fast is None or fast.dtype == torch.float32 for fast in out.state.fast)
    assert all(x.dtype == torch.bfloat16 for cache in out.state.window for x in tensors(cache))


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1, 2])
def test_consolidate_in_prelude_span_and_coda(variant: str, place: int) -> None:
    """The mixer under test stands in every layer; `place` is looped."""
    kind, options = VARIANTS[variant]
    layers = " ".join([kind] * 3 + ["gdn"])
    blocks = {kind: options} if kind != "gdn" else {"gdn": options}
    fields = {"layers": layers, "blocks": blocks, "evict": "hard", "window": 9, "span": (place, place)}
    model = make(variant, **fields)
    ids = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(3))
    start = model.evict(model(ids.flip(1)).state)

    awake, once, thrice = (
        model.evict(model(ids, start).state),
        model.consolidate(ids, start, loops=1),
        model.consolidate(ids, start, loops=3),
    )
    for a, b in zip(awake.fast, once.fast, strict=True):
        assert a is b is None or torch.equal(a, b)
    for layer, (a, b) in enumerate(zip(once.fast, thrice.fast, strict=True)):
        if a is not None:
            assert torch.equal(a, b) == (layer < place)  # the prelude runs once for any number of loops
    for got, want in zip(thrice.window, model.init_state(2).window, strict=True):
        assert_same(tensors(got), tensors(want))
    assert awake.position == once.position == thrice.position == 0


@torch.no_grad()
def test_negative_eigenvalues_write_twice_as_strongly() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    usual, twice = (make("gdn", blocks={"gdn": {"neg_eigval": flag}})(ids).state.fast[0] for flag in (False, True))
    assert_same(twice, 2 * usual)


LENGTHS = (5, 1, 12, 3)


def unpacked(cache: Any, stream: int, tokens: int) -> list[torch.Tensor]:
    """Return one stream's row of a window cache; shorter KV caches are padded at the start."""
    rows = lambda x, part: x[stream : stream + 1, :, x.shape[2] - tokens :] if isinstance(part, KV) else x[stream : stream + 1]  # noqa: E731
    return [rows(x, part) for part in parts(cache) for x in part]


@pytest.fixture
def packing(mixer: Mixer) -> None:
    if not mixer.packs:
        pytest.skip("this mixer reads no packed sequences")


@pytest.mark.usefixtures("packing")
def test_packed_sequences_are_apart(mixer: Mixer) -> None:
    """Sequences of different lengths in one row, twice after each other, then a token each: as each alone."""
    streams, first, second, last = (len(LENGTHS), *(tokens(1, sum(LENGTHS), seed).requires_grad_() for seed in (1, 2)), tokens(4, 1, 3))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    turned = torch.tensor([0, *LENGTHS[::-1]]).cumsum(0).to(torch.int32)
    fast = mixer.new_fast(streams)
    once, *state = mixer(first, fast, mixer.new_window(streams), before := Positions(0, 21, CPU, cu_seqlens=ends))
    twice, *state = mixer(second, *state, after := Positions(before.end, 21, CPU, cu_seqlens=turned))
    token, *state = mixer(last, *state, Positions(after.end, 1, CPU))
    alone = {}
    for s in range(streams):
        cut = first[:, ends[s] : ends[s + 1]], second[:, turned[s] : turned[s + 1]], last[s : s + 1]
        whole = torch.cat(cut, dim=1)
        y, own_fast, own_window = run(mixer, whole, [part.shape[1] for part in cut])
        want = y.split([part.shape[1] for part in cut], dim=1)
        assert_same(once[:, ends[s] : ends[s + 1]], want[0])
        assert_same(twice[:, turned[s] : turned[s + 1]], want[1])
        assert_same(token[s : s + 1], want[2])
        if own_fast is not None:
            assert_same(state[0][s : s + 1], own_fast)
        if own_window is not None:
            held = max(part.key.shape[2] if isinstance(part, KV) else 0 for part in parts(own_window))
            assert_same(unpacked(state[1], s, held), tensors(own_window))
        alone[s] = y
    weights = [*mixer.parameters(), first, second]
    packed = torch.autograd.grad(sum(y.square().sum() for y in (once, twice, token)), weights)
    for got, want in zip(packed, torch.autograd.grad(sum(y.square().sum() for y in alone.values()), weights), strict=True):
        assert_same(got, want)


@torch.no_grad()
@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("fields", [{}, {"evict": "hard", "window": 12, "loops": 2}, {"evict": "sliding", "window": 12, "loops": 3}])
def test_packed_streams_sleep_as_alone(variant: str, fields: dict[str, Any]) -> None:
    kind, options = VARIANTS[variant]
    recurrent = {"layers": f"gdn {kind}", "blocks": {"gdn": VARIANTS["gdn grouped"][1], kind: options}, "inject": True}
    model = make(variant, **recurrent, **fields)
    ids = torch.randint(0, 17, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    state = model.consolidate(ids, cu_seqlens=ends)
    answer, state = model(ids[:, : len(LENGTHS)], state, cu_seqlens=torch.arange(len(LENGTHS) + 1))
    further = model(ids[0, : len(LENGTHS), None], state).logits
    for s in range(len(LENGTHS)):
        own = model.consolidate(ids[:, ends[s] : ends[s + 1]])
        want, own = model(ids[:, s : s + 1], own)
        assert_same(answer[:, s : s + 1], want)
        assert_same(further[s : s + 1], model(ids[:, s : s + 1], own).logits)
        assert int(torch.as_tensor(state.position).expand(len(LENGTHS))[s]) == own.position


class Piece(nn.Module):
    def __init__(self, mixer: Mixer, length: int) -> None:
        super().__init__()
        self.mixer, self.length = mixer, length

    def forward(self, x: torch.Tensor, fast: Any, window: Any, start: torch.Tensor, valid: torch.Tensor) -> Any:
        return self.mixer(x, fast, window, Positions(start, self.length, x.device, valid))


def traced_inputs(mixer: Mixer) -> tuple[Any, ...]:
    _, fast, window = run(mixer, tokens(2, 3))
    return tokens(2, 20, seed=1), fast, window, torch.tensor(3), torch.tensor(18)


@torch.no_grad()
def test_export(mixer: Mixer) -> None:
    piece, inputs = Piece(mixer, 20), traced_inputs(mixer)
    program = torch.export.export(piece, inputs)
    assert_same(program.module()(*inputs), piece(*inputs))


@torch.no_grad()
def test_compile(mixer: Mixer) -> None:
    torch.compiler.reset()
    piece, inputs = Piece(mixer, 20), traced_inputs(mixer)
    assert_same(torch.compile(piece, fullgraph=True, backend="aot_eager")(*inputs), piece(*inputs))


BACKENDS = ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.extended)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradients_of_three_lengths(kind: str, backend: str) -> None:
    """Three lengths, of one chunk and of several, take at most two graphs."""
    mixer = make(kind).blocks[0].mixer
    counter = CompileCounterWithBackend(backend)
    torch.compiler.reset()
    compiled = torch.compile(partial(score, mixer), fullgraph=True, backend=counter)
    for length in (9, 66, 130):
        x = tokens(1, length).requires_grad_()
        torch._dynamo.maybe_mark_dynamic(x, 1)  # what torch.compile does itself after the first graph
        got, want = (torch.autograd.grad(loss(x), [x, *mixer.parameters()]) for loss in (compiled, partial(score, mixer)))
        assert_same(got, want)
    assert counter.frame_count <= 2

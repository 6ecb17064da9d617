"""Costs, compared with real tensors, real parameters and counts by hand."""

from dataclasses import fields

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.blocks.mixer import Mixer, mixers
from zoo.config import resolve
from zoo.costs import Description, count
from zoo.costs import size as in_bytes


def size(tree):
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if torch.is_tensor(leaf))


@pytest.mark.parametrize("layers", ["attn gdn", "jet swa", "mamba attn", "mamba2 swa", "gdn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_a_real_stream(layers, dtype):
    model = zoo.create("gdn4-sleep2-hard12", layers=layers, d_model=32, dtype=dtype)
    described = zoo.describe(model)
    state = model(torch.zeros(1, 12, dtype=torch.long)).state
    assert described.parameters == sum(p.numel() for p in model.parameters())
    assert described.weight_bytes == size(list(model.parameters()))
    assert described.state_bytes == size(state.fast)
    assert described.window_bytes == size(state.window)
    one, two = (size(model(torch.zeros(1, n, dtype=torch.long)).state.window) for n in (1, 2))
    assert described.kv_bytes_per_token == two - one


def test_operations_by_hand():
    """One attention block, one head of 8, MLP of 16, vocabulary of 5: only products, a multiply-add counted as two."""
    d = zoo.describe("gdn4-slide4", layers="attn", d_model=8, d_ff=16, vocab_size=5, blocks={"attn": {"heads": 1}})
    projections, mlp, head = 2 * 4 * 8 * 8, 2 * 3 * 8 * 16, 2 * 8 * 5
    assert d.flops_per_token == projections + mlp + head + 2 * 2 * 8  # scores and values of the one token it attends to


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"layers": "attn swa*2 attn", "blocks": {"swa": {"window": 7, "kv_heads": 2}}},
        {"evict": "none", "loops": 1, "wake_loops": 3, "exit": {"threshold": 0.5}, "layers": "attn"},
        {"evict": "none", "loops": 1, "wake_loops": 3, "exit": {"loop": 1}, "layers": "attn"},
        {"layers": "swa*3", "loops": 4, "span": (1, 1), "tie_embeddings": True},
    ],
)
def test_operations_as_torch_counts_them(fields):
    """Attention and MLPs consist of products that torch counts."""
    model = zoo.create("gdn4-sleep2-slide12", d_model=32, **fields)
    described = zoo.describe(model)

    def counted(run, length):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the backend whose products it counts
            run(torch.zeros(1, length, dtype=torch.long))
        return counter.get_total_flops()

    assert described.flops_per_token == counted(model, 1)
    if model.config.window:
        assert described.flops_per_sleep == counted(model.consolidate, 12)


def test_a_block_of_another_package_is_counted_by_its_linear_layers(monkeypatch):
    class Plain(Mixer):
        def __init__(self, d_model, options, reach):
            super().__init__(d_model, options, reach)
            self.o_proj = torch.nn.Linear(d_model, d_model)

    monkeypatch.setattr(mixers, "get", lambda kind, field="": Plain)
    described = zoo.describe({"name": "other", "layers": "plain", "d_model": 8, "d_ff": 16, "vocab_size": 5})
    assert described.flops_per_token == 2 * (8 * 8 + 3 * 8 * 16 + 8 * 5)
    assert described.state_bytes == described.kv_bytes_per_token == 0


def test_a_sleep_costs_its_passes():
    once, thrice = (zoo.describe(f"gdn4-sleep{n}-slide24", d_model=32, span=(1, 2)).flops_per_sleep for n in (1, 3))
    half = zoo.describe("gdn4-sleep1-slide24", d_model=32, layers="gdn attn").flops_per_sleep
    assert thrice - once == 2 * half
    block = zoo.describe("gdn4-sleep1-slide24", d_model=32, layers="gdn").flops_per_sleep
    looped = zoo.describe("gdn4-sleep3-slide24", d_model=32, layers="gdn*3", span=(1, 1)).flops_per_sleep
    assert looped == 5 * block, "the blocks outside the span run once"
    assert zoo.describe("gdn4").flops_per_sleep is None
    assert zoo.describe("gdn4-sleep3-hard1").window_bytes == zoo.describe("gdn4-sleep3-hard1").kv_bytes_per_token + 2 * 3 * 1024 * 4


def test_a_sleep_that_empties_the_window_ends_with_the_last_fast_weights():
    """On a first window, hard and sliding differ by the work whose result nothing reads: the MLP of gdn, and two attention blocks."""

    def flops(evict, layers, **fields):
        return zoo.describe(f"gdn4-sleep3-{evict}24", d_model=32, layers=layers, **fields).flops_per_sleep

    attention = flops("slide", "attn", loops=1)
    with_mlp, without = (flops("slide", "gdn", loops=1, blocks={"gdn": {"mlp": mlp}}) for mlp in (True, False))
    assert flops("slide", "attn gdn attn*2") - flops("hard", "attn gdn attn*2") == with_mlp - without + 2 * attention
    assert flops("slide", "gdn attn*2", span=(1, 2)) - flops("hard", "gdn attn*2", span=(1, 2)) == with_mlp - without + 6 * attention


def test_a_table_says_what_it_found():
    text = str(zoo.describe("gdn4-sleep4-slide512"))
    assert "4 passes of layers 0-3" in text
    assert "sliding" in text
    assert "never (evict: none)" in str(zoo.describe("gdn4"))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (999_400, "999 K"),
        (999_600, "1.00 M"),
        (1_960_270_848, "1.96 B"),
        (24.6e12, "24.6 T"),
        (12_345e12, "12,345 T"),
    ],
)
def test_numbers_are_written_with_three_digits(number, text):
    assert count(number) == text


def test_a_description_fits_80_columns():
    """Of every model, with the widest numbers."""
    sizes = {field.name: 123_456 * 10**12 for field in fields(Description) if field.name != "config"}
    for name in zoo.list_models():
        assert max(map(len, str(Description(config=resolve(name), **sizes)).splitlines())) <= 80


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "0.999 KiB"), (1_023_590, "0.976 MiB"), (54 * 2**20, "54 MiB"), (2 * 2**40, "2 TiB")],
)
def test_bytes_have_three_digits(number, text):
    assert in_bytes(number) == text

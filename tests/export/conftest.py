from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch

import zoo
from zoo.export import assembly
from zoo.export.plan import Plan
from zoo.export.verify import Parity

SMALL = {
    "d_model": 16,
    "vocab_size": 11,
    "d_ff": 16,
    "evict": "hard",
    "window": 6,
    "loops": 2,
    "blocks": {
        "attn": {"heads": 2},
        "swa": {"heads": 2, "window": 3},
        "gdn": {"heads": 2},
        "kda": {"heads": 2},
        "mla": {"heads": 2, "rank": 6, "shared_dim": 3},
        "jet": {"heads": 2},
        "mamba": {"state_dim": 4},
        "mamba2": {"head_dim": 8, "state_dim": 8},
    },
}
PREFILL = {"prefill": 4}
CASES = {
    "hard": ({"layers": "attn gdn", "loops": 3, "learned_positions": "asleep"}, {}),
    # fast weights before and inside the span, KV inside and after it, grouped heads, a window inside the window, norm and injection
    "sliding": (
        {
            "layers": "gdn swa gdn attn",
            "evict": "sliding",
            "window": 5,
            "loops": 3,
            "span": [1, 2],
            "loop_norm": True,
            "inject": True,
            "residual_gates": 2,
            "blocks": {"attn": {"kv_heads": 1}},
        },
        PREFILL,
    ),
    # one pass of a span without fast weights, which only the coda has; tied embeddings
    "once": ({"layers": "swa gdn", "loops": 1, "span": [0, 0], "tie_embeddings": True}, {}),
}
# all mixers, policies, forms of a sleep, and both dialects; of few sizes, since an export traces equal blocks once in a process
FORMS = {
    "mix": (
        {
            "layers": "mamba2 swa jet gdn attn mamba",
            "evict": "sliding",
            "window": 5,
            "span": [1, 4],
            "blocks": {"attn": {"kv_heads": 1}, "mamba2": {"groups": 2}},
        },
        {},
    ),
    "ouro": (
        {
            "layers": "attn*2",
            "evict": "none",
            "window": None,
            "loops": 1,
            "wake_loops": 3,
            "loop_norm": True,
            "residual_gates": 2,
            "exit": {},
        },
        {"max_length": 6},
    ),
    "full": ({"layers": "gdn swa", "evict": "none", "window": None, "loops": 1}, {"max_length": 6, **PREFILL}),
    "late": ({"layers": "attn gdn attn", "loops": 2}, {}),
    "chunks": ({"layers": "gdn", "window": 70}, {}),
    "scan": ({"layers": "gdn", "window": 530}, {}),
    "unrolled": (
        {"layers": "attn gdn attn", "loops": 3, "span": [0, 1], "loop_norm": True, "learned_positions": True, "residual_gates": 2},
        {"sleep": "unroll"},
    ),
    "per-pass": (
        {
            "layers": "gdn attn gdn",
            "evict": "sliding",
            "window": 5,
            "loops": 3,
            "span": [1, 1],
            "inject": True,
            "residual_gates": 3,
            "blocks": {"attn": {"kv_heads": 1}},
        },
        {"sleep": "per-pass"},
    ),
    "ort": ({"layers": "attn gdn", "window": 12}, {"dialect": "ort", **PREFILL}),
    # positions that are slots: the operator that reads filled slots only, with grouped heads and a window inside the window
    "ort-full": (
        {"layers": "attn swa", "evict": "none", "window": None, "loops": 1, "blocks": {"attn": {"kv_heads": 1}}},
        {"dialect": "ort", "max_length": 6},
    ),
    "ort-mamba2": ({"layers": "mamba2", "blocks": {"mamba2": {"groups": 2}}}, {"dialect": "ort"}),
    # groups that are not full, and heads with and without an embedding of their own
    "int8": ({"layers": "gdn", "d_model": 40, "tie_embeddings": True}, {"weights": "int8"}),
    "int4": ({"layers": "gdn", "d_model": 40, "tie_embeddings": True}, {"weights": "int4"}),
    "exact": ({"layers": "gdn", "d_model": 40}, {"weights": "int8", "exact_activations": True}),
    "ort-int8": ({"layers": "gdn", "d_model": 40}, {"weights": "int8", "dialect": "ort"}),
    "ort-int4": ({"layers": "gdn", "d_model": 40, "tie_embeddings": True}, {"weights": "int4", "dialect": "ort"}),
    "half": ({"layers": "gdn attn", "dtype": torch.float16}, {}),
}
OUROJET = {
    "layers": "attn*2 jet attn jet",
    "loop_norm": True,
    "exit": {"threshold": 1.0},
    "blocks": {"attn": {"post_norm": True}, "jet": {"mlp": False, "inserted": True}},
}
# each mixer alone, and more families
MORE = {
    "attn": ({"layers": "attn", "evict": "sliding"}, PREFILL),
    "swa": ({"layers": "swa", "evict": "sliding"}, PREFILL),
    "gdn": ({"layers": "gdn", "blocks": {"gdn": {"value_heads": 4, "neg_eigval": True, "gate": False}}}, PREFILL),
    "kda": ({"layers": "kda attn"}, PREFILL),
    "kda-scan": ({"layers": "kda", "window": 530}, {}),
    "ort-kda": ({"layers": "kda attn", "evict": "sliding"}, {"dialect": "ort", **PREFILL}),
    "mla": ({"layers": "kda mla", "evict": "sliding", "window": 5}, PREFILL),
    "ort-mla": ({"layers": "kda mla"}, {"dialect": "ort", **PREFILL}),
    "jet": ({"layers": "jet"}, PREFILL),
    "mamba": ({"layers": "mamba"}, PREFILL),
    "mamba2": ({"layers": "mamba2", "blocks": {"mamba2": {"groups": 2}}}, PREFILL),
    "gdn4": ({"name": "gdn4-sleep4"}, {"prefill": 8}),
    "ort-gdn4": ({"layers": "(attn gdn)*2"}, {"dialect": "ort", **PREFILL}),
    "ort-mix": ({"layers": "mamba2 swa jet gdn attn mamba", "evict": "sliding", "span": [1, 4]}, {"dialect": "ort"}),
    "jets": ({"layers": "jet attn jet swa jet", "span": [1, 3], "norm": "wide", "tie_embeddings": True}, PREFILL),
    **{f"ourojet{seed}": (OUROJET | {"seed": seed}, {}) for seed in range(4)},
    "ourojet-loud": (OUROJET | {"loud": 0.3}, {}),
    "samba": ({"layers": "(mamba swa)*2", "tie_embeddings": True}, PREFILL),
}
ALL = CASES | FORMS | MORE


def graphs_in(graph):
    """A graph of an ONNX file, and those inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs_in(attribute.g)


class Exported(NamedTuple):
    model: zoo.Model
    folder: Path
    parity: Parity


def small(loud: float | None = None, **fields) -> zoo.Model:
    """Create a small model. loud: standard deviation of weights that are initialized to zero; default: as the others."""
    fields = dict(fields)
    if "name" in fields:  # a model from its config
        return zoo.create(fields["name"])
    dtype = fields.pop("dtype", torch.float32)
    model = zoo.create(zoo.create("gdn4", **SMALL).config, dtype=dtype, **fields)
    branches = sum(1 if block.mlp is None else 2 for block in model.blocks)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # zeros would hide errors in what they multiply
        if not parameter.any():
            usual = 0.3 if parameter.ndim == 1 else (parameter.shape[1] * (branches if name.endswith("o_proj.weight") else 1)) ** -0.5
            torch.nn.init.normal_(parameter, std=usual if loud is None else loud, generator=generator)
    return model


_build, _traced = assembly.build, {}


def build(graph, dialect):
    """Build a graph as `assembly.build` does, but trace it once for all bundles of the same model."""
    options = {name: value for name, value in vars(graph).items() if name[0] != "_"}
    key = (type(graph), id(graph.model), dialect, str(options))
    if key not in _traced:
        _traced[key] = _build(graph, dialect), graph.model  # the id is the model's as long as it lives
    return _traced[key][0].clone()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Export each case when a test first needs it."""

    @functools.cache
    def bundle(case: str) -> Exported:
        fields, plan = ALL[case]
        model, folder = small(**fields), tmp_path_factory.mktemp("bundle") / case
        few = {"prefill": None} | plan  # tracing is what takes time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assembly, "build", build)
            return Exported(model, folder, zoo.export.export(model, folder, plan=Plan(**few)))

    return bundle


@pytest.fixture(params=CASES)
def bundle(request, bundles) -> Exported:
    return bundles(request.param)

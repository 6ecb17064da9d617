from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import zoo
from zoo.export.verify import Parity

SMALL = {
    "d_model": 16,
    "vocab_size": 11,
    "d_ff": 16,
    "blocks": {"attn": {"heads": 2}, "swa": {"heads": 2, "window": 3}, "gdn": {"heads": 2}},
}
CASES = {
    "hard": {"layers": "attn gdn", "evict": "hard", "window": 6, "loops": 3},
    # fast weights before the span and in it, KV in it and after it, grouped heads, a window inside the window, something between passes
    "sliding": {
        "layers": "gdn swa gdn attn",
        "evict": "sliding",
        "window": 5,
        "loops": 3,
        "span": [1, 2],
        "loop_norm": True,
        "inject": True,
        "blocks": {"attn": {"kv_heads": 1}},
    },
    # one pass of a span without fast weights, which the coda has; the word embedding is the head
    "once": {"layers": "swa gdn", "evict": "hard", "window": 6, "loops": 1, "span": [0, 0], "tie_embeddings": True},
}


class Exported(NamedTuple):
    model: zoo.Model
    folder: Path
    parity: Parity


def small(**fields) -> zoo.Model:
    model = zoo.create(zoo.create("gdn4", **SMALL).config, **fields)
    if model.config.inject:  # starts at zero, which would hide it
        torch.nn.init.normal_(model.inject, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Each case exported once, when a test first asks for it."""
    made: dict[str, Exported] = {}

    def bundle(case: str) -> Exported:
        if case not in made:
            folder = tmp_path_factory.mktemp("bundles") / case
            model = small(**CASES[case])
            made[case] = Exported(model, folder, zoo.export.export(model, folder))
        return made[case]

    return bundle


@pytest.fixture(params=CASES)
def bundle(request, bundles) -> Exported:
    return bundles(request.param)

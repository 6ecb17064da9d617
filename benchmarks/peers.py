"""Models that also exist in transformers, with the same random weights on both sides."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import zoo

if not torch.cuda.is_available():
    sys.modules["fla"] = None  # type: ignore[assignment]  # its kernels need a GPU, but transformers would call them
import transformers

WORDS = 32000
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "GDN + attention 50M": (
        "Qwen3_5TextConfig",
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "GDN + attention 400M": (
        "Qwen3_5TextConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "GDN + attention 2B": (
        "Qwen3_5TextConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "attention 50M": (
        "LlamaConfig",
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 10,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "Mamba 50M": ("MambaConfig", {"hidden_size": 512, "num_hidden_layers": 20}),
    "Mamba 370M": ("MambaConfig", {"hidden_size": 1024, "num_hidden_layers": 48}),
    "Mamba-2 50M": ("Mamba2Config", {"hidden_size": 512, "num_hidden_layers": 20, "num_heads": 16, "tie_word_embeddings": True}),
    "Mamba-2 370M": ("Mamba2Config", {"hidden_size": 1024, "num_hidden_layers": 48, "num_heads": 32, "tie_word_embeddings": True}),
}
SMALL = [name for name in SIZES if name.endswith("50M")]
LARGE = ["GDN + attention 400M", "Mamba 370M", "Mamba-2 370M"]


def write(name: str, folder: str | Path, dtype: str = "float32") -> None:
    """Save a model with random weights in transformers' format."""
    kind, fields = SIZES[name]
    config = getattr(transformers, kind)(vocab_size=WORDS, **fields)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def pairs(large: bool) -> Iterator[tuple[str, zoo.Model, Any]]:
    """Yield the name, our model and the transformers model for every small size, and with `large` for the others too."""
    for name in SMALL + LARGE * large:
        yield name, *pair(name)


def pair(name: str) -> tuple[zoo.Model, Any]:
    """Return our model and the transformers model in float32."""
    with tempfile.TemporaryDirectory() as folder:
        write(name, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return zoo.load(folder), theirs.eval()

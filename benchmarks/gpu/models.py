"""The models of the GPU benchmarks, at full size and at the size of a rehearsal, and the same weights in transformers."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
ATTENTION = {"rotary": 0.25, "rope_theta": 10000.0, "qk_norm": "centred", "gate": True, "bias": False, "o_bias": False, "norm_eps": 1e-6}
HYBRID: dict[str, Any] = {  # Qwen3.5's form, 0.4 B parameters
    "name": "hybrid",
    "upstream": {"model_type": "qwen3_5_text"},
    "vocab_size": 32000,
    "d_model": 1024,
    "d_ff": 3584,
    "norm": "centred",
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "layers": "(gdn*3 attn)*4 gdn*2",
    "blocks": {
        "gdn": {"heads": 16, "value_heads": 16, "head_dim": 128, "expand_v": 1.0, "conv_size": 4, "norm_eps": 1e-6},
        "attn": {"heads": 8, "kv_heads": 2, "head_dim": 256, **ATTENTION},
    },
}
MAMBA2: dict[str, Any] = {  # 0.4 B parameters
    "name": "mamba2",
    "upstream": {"model_type": "mamba2"},
    "vocab_size": 32000,
    "d_model": 1024,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
    "layers": "mamba2*48",
    "blocks": {
        "mamba2": {
            "mlp": False,
            "residual_in_fp32": True,
            "expand": 2,
            "state_dim": 128,
            "conv_size": 4,
            "conv_bias": True,
            "bias": False,
            "head_dim": 64,
            "groups": 1,
            "norm_eps": 1e-5,
        }
    },
}
TINY = {
    "hybrid": {"vocab_size": 256, "d_model": 64, "d_ff": 128, "layers": "gdn*3 attn"},
    "mamba2": {"vocab_size": 256, "d_model": 64, "layers": "mamba2*2"},
}
TINY_BLOCKS = {
    "gdn": {"heads": 2, "value_heads": 2, "head_dim": 32},
    "attn": {"heads": 2, "kv_heads": 1, "head_dim": 32},
    "mamba2": {"state_dim": 32, "head_dim": 32},
}
MODELS = {"hybrid": HYBRID, "mamba2": MAMBA2}


def create(name: str, dry: bool, **fields: Any) -> zoo.Model:
    """Return a model with random weights in bfloat16."""
    config = dict(MODELS[name])
    if dry:
        config |= TINY[name] | {"blocks": {kind: options | TINY_BLOCKS[kind] for kind, options in config["blocks"].items()}}
    return zoo.create(config, device=DEVICE, dtype=DTYPE, **fields)


def peer(model: zoo.Model) -> Any:
    """Return the transformers model with the same weights. On a GPU, the hybrid needs fla: transformers would silently do without."""
    if DEVICE.type == "cuda" and model.config.name == "hybrid":
        importlib.import_module("fla.ops.gated_delta_rule")
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        zoo.save(model, folder, format="hf")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE).eval()


def greedy(model: Any, prompt: Tensor, tokens: int) -> Callable[[], Tensor]:
    """Return a function that generates the next greedy tokens, [B, `tokens`], of a transformers model after `prompt`."""
    out = model(prompt, use_cache=True)

    def generate() -> Tensor:
        nonlocal out
        generated = []
        for _ in range(tokens):
            generated.append(out.logits[:, -1].argmax(-1))
            cache = {name: getattr(out, name) for name in ("past_key_values", "cache_params") if hasattr(out, name)}
            out = model(generated[-1][:, None], **cache, use_cache=True)
        return torch.stack(generated, dim=1)

    return generate


def tokens(model: zoo.Model, batch: int, length: int) -> Tensor:
    """Return random tokens, [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(DEVICE)

"""Prefill and decode of every family that transformers has too, on the same random weights. One thread, float32.

    python -m benchmarks.families [FAMILY ...]

Both sides run without compiled kernels, and a prompt ends with the logits of its last token, as in generation. As in `zoo chat`, our
weights are laid out as `zoo.arrange_weights` finds; both sides run under the precision that `zoo.matmul_precision` finds. Dense
Qwen3.5, Mamba and Mamba-2 are in benchmarks/prefill.py and decode.py.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from benchmarks import decode
from benchmarks.gpu.models import greedy
from benchmarks.measure import compare, difference, record
from benchmarks.peers import WORDS

PROMPT, TOKENS = 512, 64
TOLERANCE = 1e-4
KERNELS = ("fla", "mamba_ssm", "causal_conv1d", "kernels", "flash_attn", "mambapy")
SIZE: dict[str, Any] = {
    **{"vocab_size": WORDS, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "tie_word_embeddings": True},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 16, "mamba_d_state": 128}
MAMBA2_LAYERS = {"layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 2}
CONV_LAYERS = {"layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv", "full_attention", "conv"]}
ROUTED: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
QWEN: dict[str, Any] = {
    **{"num_attention_heads": 4, "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    **{**ROUTED, "shared_expert_intermediate_size": 256},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bamba": ("bamba", {**MAMBA2, "attn_layer_indices": [5]}),
    "Granite 4 dense": ("granitemoehybrid", {**MAMBA2, **MAMBA2_LAYERS, "num_local_experts": 0, "shared_intermediate_size": 1536}),
    "Granite 4 with experts": (
        "granitemoehybrid",
        {
            **{**MAMBA2, **MAMBA2_LAYERS, "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 256},
            "shared_intermediate_size": 512,
        },
    ),
    "Falcon Mamba": ("falcon_mamba", {"intermediate_size": 1024}),
    "Jamba": ("jamba", {"intermediate_size": 768, "num_experts": 8, "num_experts_per_tok": 2}),
    "OLMo Hybrid": ("olmo_hybrid", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "Qwen3-Next": ("qwen3_next", QWEN),
    "Qwen3.5 with experts": ("qwen3_5_moe_text", QWEN),
    "Nemotron-H": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "mamba", "mlp", "attention", "moe", "mamba", "moe"],
            **{"mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 2, "ssm_state_size": 128, "n_routed_experts": 16},
            **{"num_experts_per_tok": 4, "moe_intermediate_size": 384, "moe_shared_expert_intermediate_size": 384},
            **{"head_dim": 64, "tie_word_embeddings": False},
        },
    ),
    "Falcon-H1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 1024, "head_dim": 64}),
    "LFM2": ("lfm2", {**CONV_LAYERS, "block_auto_adjust_ff_dim": False}),
    "LFM2 with experts": ("lfm2_moe", {**CONV_LAYERS, **ROUTED, "num_dense_layers": 2}),
    "RecurrentGemma": ("recurrent_gemma", {"num_key_value_heads": 1}),
    "Kimi Linear": (
        "kimi_linear",
        {
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            **{"v_head_dim": 128, "linear_head_dim": 128, "linear_num_heads": 4, "num_local_experts": 16, "num_experts_per_tok": 4},
            **{"moe_intermediate_size": 256, "tie_word_embeddings": False},
        },
    ),
}


def pair(kind: str, fields: dict[str, Any]) -> tuple[zoo.Model, Any]:
    """Return our model and the transformers model of one configuration."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZE, **fields}), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return zoo.load(folder), theirs.eval()


def read(model: Any, ids: Tensor) -> Tensor:
    return model(ids, logits_to_keep=1).logits


@click.command()
@click.argument("families", nargs=-1, type=click.Choice(list(FAMILIES)))
@torch.no_grad()
def main(families: tuple[str, ...]) -> None:
    rows: list[dict[str, Any]] = []
    sys.modules.update(dict.fromkeys(KERNELS))  # transformers finds none of them
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(zoo.matmul_precision())
    ids = torch.randint(3, WORDS, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for name in families or FAMILIES:
        model, theirs = pair(*FAMILIES[name])
        zoo.arrange_weights(model)
        assert difference(model(ids).logits, theirs(ids).logits) < TOLERANCE, name
        reading = {"ours": partial(read, model, ids), "transformers": partial(read, theirs, ids)}
        rows.append(compare(f"{name}, {PROMPT} tokens", reading, rounds=3, target=1.3, tolerance=TOLERANCE))
        decoding = {"ours": decode.ours(model, ids, TOKENS), "transformers": greedy(theirs, ids, TOKENS)}
        rows.append(compare(f"{name}, a token", decoding, rounds=2, per=TOKENS, target=1, tolerance=0))
    record("families", rows)


if __name__ == "__main__":
    main()

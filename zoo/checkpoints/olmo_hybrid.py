"""OLMo Hybrid: Gated DeltaNet with norms before, and attention with norms after the mixer and the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.checkpoints.family import Family, FirstOf, Names, Taps, compact, families, layer_kinds, options, under
from zoo.checkpoints.llama import ATTENTION, LAYER, MLP, TOP, heads, read_bias, size, write_heads, write_size
from zoo.checkpoints.qwen3_next import KINDS, write_layers
from zoo.config import ModelConfig

CONVOLUTIONS = tuple(f"{name}_conv1d.weight" for name in "qkv")
GDN: Names = {
    **{f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvgabo"},
    **{f"{name}_conv1d.weight": Taps((f"{name}_conv",)) for name in "qkv"},
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "o_norm.weight": "o_norm.weight",
}
BLOCK: Names = {
    **MLP,
    "attention_layer_norm.weight": "mixer_norm.weight",
    "feedforward_layer_norm.weight": "mlp_norm.weight",
    "post_attention_layernorm.weight": "mixer_post_norm.weight",
    "post_feedforward_layernorm.weight": "mlp_post_norm.weight",
}
# transformers 5 cuts the stacked kernels into equal thirds, and renames a norm of attention layers as if they were recurrent
GDN5: Names = {
    **under("linear_attn.", {name: ours for name, ours in GDN.items() if name not in CONVOLUTIONS}),
    tuple(f"linear_attn.{name}" for name in CONVOLUTIONS): Taps(("q_conv", "k_conv", "v_conv")),
}
BLOCK5: Names = {
    **{name: ours for name, ours in BLOCK.items() if name != "post_attention_layernorm.weight"},
    "feedforward_layer_norm.weight": FirstOf(("mlp_norm.weight", "mixer_post_norm.weight")),
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    count, hidden, eps = config["num_attention_heads"], config["hidden_size"], config.get("rms_norm_eps", 1e-6)
    kinds = layer_kinds(config, KINDS, lambda i: "attn" if i % 4 == 3 else "gdn")
    if "layer_types" not in config and "attn" not in kinds:
        kinds[-1] = "attn"
    keys = config.get("linear_num_key_heads") or count
    key_dim = config.get("linear_key_head_dim") or int(0.75 * hidden / keys)
    gdn = {
        "heads": keys,
        "value_heads": config.get("linear_num_value_heads") or count,
        "head_dim": key_dim,
        "expand_v": (config.get("linear_value_head_dim") or 2 * key_dim) / key_dim,
        "conv_size": config.get("linear_conv_kernel_dim", 4),
        "neg_eigval": config.get("linear_allow_neg_eigval", True),
        "norm_eps": 1e-5,
    }
    stated = {**config, **(config.get("rope_parameters") or {})}
    rotates = stated.get("rope_theta", 10_000.0) is not None
    attention = {
        **heads(config if rotates else {**config, "rope_parameters": None, "rope_theta": 10_000.0}, context=65_536),
        **({} if rotates else {"rotary": 0.0}),
        **read_bias(config),
        **{"qk_norm": "wide", "qk_norm_whole": True, "norm_eps": eps, "pre_norm": False, "post_norm": True},
    }
    blocks = {"attn": attention, "gdn": gdn}
    return {**size(config), "norm": "wide", "layers": compact(kinds), "blocks": {kind: blocks[kind] for kind in set(kinds)}}


def write(config: ModelConfig) -> dict[str, Any]:
    gdn, attention = options(config, "gdn"), options(config, "attn")
    positions = {} if attention.rotary else {"rope_theta": None, "rope_parameters": {"rope_theta": None, "rope_type": "default"}}
    return {
        **write_size(config, "olmo_hybrid", "OlmoHybridForCausalLM"),
        **write_heads(config),
        **positions,
        **{f"{name}_token_id": None for name in ("pad", "bos", "eos")},  # upstream's defaults do not fit other vocabularies
        "attention_bias": attention.bias,
        **write_layers(config, gdn),
        "linear_allow_neg_eigval": gdn.neg_eigval,
    }


FAMILY = Family(
    read=read,
    write=write,
    top=TOP,
    layer=LAYER,
    block=BLOCK,
    mixers={"attn": ATTENTION, "gdn": under("linear_attn.", GDN)},
)
TRANSFORMERS5 = replace(FAMILY, block=BLOCK5, mixers={"attn": ATTENTION, "gdn": GDN5})
families.register("olmo_hybrid", replace(FAMILY, forms={"transformers 5": TRANSFORMERS5}))

"""Samba and Gated DeltaNet in the format of their authors' fork of lit-gpt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints import fla
from zoo.checkpoints.family import Family, Names, Ones, Stacked, compact, expect, families, options, under
from zoo.checkpoints.mamba import MAMBA
from zoo.config import ModelConfig
from zoo.errors import ZooError

TOP: Names = {"transformer.wte.weight": "embed.weight", "transformer.ln_f.weight": "norm.weight", "lm_head.weight": "head.weight"}
BLOCK: Names = {
    "norm_1.weight": "mixer_norm.weight",
    "norm_2.weight": "mlp_norm.weight",
    "mlp.swiglu.w1.weight": "mlp.gate_proj.weight",
    "mlp.swiglu.w2.weight": "mlp.up_proj.weight",
    "mlp.swiglu.w3.weight": "mlp.down_proj.weight",
}
ATTENTION: Names = {
    "attn.attn.weight": Stacked(("q_proj.weight", "k_proj.weight", "v_proj.weight"), per="kv_heads"),
    "attn.proj.weight": "o_proj.weight",
}
GDN: Names = {
    **{name: ours for name, ours in fla.GDN.items() if not str(name).startswith(("a_", "o_norm"))},
    "gk_proj.weight": "a_proj.weight",
    "b_proj.bias": "b_proj.bias",
    "g_norm_swish_gate.weight": "o_norm.weight",
    "D": Ones("value_heads"),
}
OFF = ("mamba", "sc_attn", "use_mega", "abl_mamba", "mamba_swa_mlp", "shared_attention_norm")


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    for flag in OFF:
        expect(config, flag, False, default=False)
    for flag in ("parallel_residual", "bias"):
        expect(config, flag, False, default=True)
    expect(config, "mlp", True, default=True)
    expect(config, "_norm_class", "RMSNorm", "FusedRMSNorm")
    expect(config, "_mlp_class", "LLaMAMLP")
    expect(config, "condense_ratio", 1, default=1)
    if config.get("ret_per_layer", -1) > 0 or config.get("gla_per_layer", -1) > 0:
        raise ZooError("ret_per_layer, gla_per_layer: retention and GLA layers are not supported; want -1")

    placed = config.get("attn_layer_pos")
    placed = json.loads(placed) if isinstance(placed, str) else placed
    full, every = config.get("full_per_layer", 1_000_000), config.get("mb_per_layer", -1)

    delta = config.get("gated_delta_per_layer", -1)

    def kind(i: int) -> str:
        if delta > 0 and i % delta == 0:
            return "gdn"
        mamba = i not in placed if placed is not None else every > 0 and i % every == 0
        return "mamba" if mamba else "swa" if i % full < full - 1 and config["local_window"] > 0 else "attn"

    kinds = [kind(i) for i in range(config["n_layer"])]
    attention = {
        "heads": config["n_head"],
        "kv_heads": config.get("n_query_groups") or config["n_head"],
        "head_dim": config["n_embd"] // config["n_head"],
        "rotary": 0.0 if config.get("nope") else config.get("rotary_percentage", 0.25),
    }
    # hard-coded sizes in the code of GatedDeltaNet's authors
    keys, values = int(0.75 * config["n_embd"]) // 9, int(1.5 * config["n_embd"]) // 9
    gdn = {"heads": 9, "head_dim": keys, "expand_v": values / keys, "write_bias": True}
    blocks = {"mamba": {}, "gdn": gdn, "swa": {**attention, "window": config["local_window"]}, "attn": attention}
    return {
        "vocab_size": config["padded_vocab_size"],
        "d_model": config["n_embd"],
        "d_ff": config["intermediate_size"],
        "layers": compact(kinds),
        "norm_eps": config["norm_eps"],
        "tie_embeddings": config.get("mamba_init", False),
        "blocks": {kind: blocks[kind] for kind in set(kinds)},
    }


def write(config: ModelConfig) -> dict[str, Any]:
    attention = options(config, "swa" if "swa" in config.pattern else "attn")
    return {
        "name": config.name,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_layer": len(config.pattern),
        "n_head": attention.heads,
        "n_query_groups": attention.kv_heads or attention.heads,
        "n_embd": config.d_model,
        "intermediate_size": config.mlp_width,
        "norm_eps": config.norm_eps,
        "rotary_percentage": attention.rotary or 1.0,
        "nope": not attention.rotary,
        "mamba_init": config.tie_embeddings,
        "local_window": attention.window if "swa" in config.pattern else -1,
        **_places(config),
        "full_per_layer": _full_every(config),
        "parallel_residual": False,
        "bias": False,
        "_norm_class": "FusedRMSNorm",
        "_mlp_class": "LLaMAMLP",
    }


def _places(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that place the recurrent layers."""
    if "gdn" in config.pattern:
        return {
            "mb_per_layer": -1,
            "gated_delta_per_layer": next((i for i, kind in enumerate(config.pattern) if i and kind == "gdn"), len(config.pattern)),
        }
    return {"mb_per_layer": 2, "attn_layer_pos": json.dumps([i for i, kind in enumerate(config.pattern) if kind != "mamba"])}


def _full_every(config: ModelConfig) -> int:
    """Return n such that full attention is every n-th of the attention layers."""
    counts: list[int] = [1_000_000, *range(1, len(config.pattern) + 1)]
    for every in counts:
        if all((i % every == every - 1) == (kind == "attn") for i, kind in enumerate(config.pattern) if kind in ("attn", "swa")):
            return every
    raise ZooError(f"layers: '{config.layers}': this checkpoint format only places full attention at every n-th layer")


families.register(
    "lit_gpt",
    Family(
        read=read,
        write=write,
        top=TOP,
        layer="transformer.h.{}.",
        block=BLOCK,
        mixers={"mamba": under("attn.", MAMBA), "gdn": under("attn.", GDN), "swa": ATTENTION, "attn": ATTENTION},
        stores_tied_head=True,
    ),
)

"""GGUF files of our models, for llama.cpp. Needs `pip install '.[llama]'`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo

MLP = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


def takes(model: zoo.Model) -> bool:
    """Return whether `write_gguf` has a form for the model."""
    return {*model.config.pattern} <= {"mamba2", "attn", "gdn"}


def write_gguf(model: zoo.Model, file: Path) -> None:
    """Write a float32 model as GGUF, without a tokenizer: blocks of mamba2, of attn as in Llama, or of gdn and attn as in Qwen3.5.

    The kinds of blocks decide the architecture.
    """
    import gguf

    kinds = set(model.config.pattern)
    form = {"mamba2": "mamba2", "attn": "llama", "gdn": "qwen35"}[max(kinds)]
    writer = gguf.GGUFWriter(file, form)
    writer.add_context_length(2**15)
    writer.add_embedding_length(model.config.d_model)
    writer.add_block_count(len(model.blocks))
    writer.add_layer_norm_rms_eps(model.config.norm_eps)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for kind in kinds:
        {"mamba2": _mamba2_fields, "attn": _attention_fields, "gdn": _gdn_fields}[kind](writer, model)
    for name, tensor in _tensors(model, form):
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _mamba2_fields(writer: Any, model: zoo.Model) -> None:
    mixer: Any = model.blocks[0].mixer
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(mixer.taps)
    writer.add_ssm_inner_size(mixer.inner)
    writer.add_ssm_state_size(mixer.state_dim)
    writer.add_ssm_time_step_rank(mixer.heads)
    writer.add_ssm_group_count(mixer.groups)


def _attention_fields(writer: Any, model: zoo.Model) -> None:
    mixer: Any = model.blocks[model.config.pattern.index("attn")].mixer
    options = model.config.blocks["attn"]
    writer.add_feed_forward_length(model.config.mlp_width)
    writer.add_head_count(mixer.heads)
    writer.add_head_count_kv(mixer.kv_heads)
    writer.add_key_length(mixer.head_dim)
    writer.add_value_length(mixer.head_dim)
    writer.add_rope_freq_base(options.get("rope_theta", 10_000.0))
    writer.add_rope_dimension_count(int(options.get("rotary", 1.0) * mixer.head_dim))


def _gdn_fields(writer: Any, model: zoo.Model) -> None:
    mixer: Any = model.blocks[model.config.pattern.index("gdn")].mixer
    writer.add_ssm_conv_kernel(mixer.q_conv.shape[1])
    writer.add_ssm_inner_size(mixer.values)
    writer.add_ssm_state_size(mixer.key_dim)
    writer.add_ssm_time_step_rank(mixer.value_heads)
    writer.add_ssm_group_count(mixer.heads)
    writer.add_array("qwen35.attention.recurrent_layers", [kind == "gdn" for kind in model.config.pattern])
    writer.add_rope_dimension_sections([11, 11, 10, 0])  # of images; all equal for text


def _tensors(model: zoo.Model, form: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under llama.cpp's names."""
    offset = 1.0 if form == "qwen35" else 0.0  # our norms of this form store the weight minus one
    yield "token_embd.weight", model.embed.weight
    yield "output_norm.weight", model.norm.weight + offset
    if not model.config.tie_embeddings:
        yield "output.weight", model.head.weight
    for i, (kind, block) in enumerate(zip(model.config.pattern, model.blocks, strict=True)):
        at, mixer, mlp = f"blk.{i}.", block.mixer, block.mlp
        yield f"{at}attn_norm.weight", block.mixer_norm.weight + offset
        for name, tensor in {"mamba2": _mamba2, "attn": _attention, "gdn": _gdn}[kind](mixer):
            yield at + name, tensor
        if mlp is not None:
            yield f"{at}{'post_attention_norm' if form == 'qwen35' else 'ffn_norm'}.weight", block.mlp_norm.weight + offset
            for name, ours in MLP.items():
                yield f"{at}{name}.weight", getattr(mlp, ours).weight


def _mamba2(mixer: Any) -> Iterator[tuple[str, Tensor]]:
    yield "ssm_in.weight", mixer.in_proj.weight
    yield "ssm_conv1d.weight", mixer.conv_weight
    yield "ssm_conv1d.bias", mixer.conv_bias
    yield "ssm_dt.bias", mixer.dt_bias
    yield "ssm_a", -mixer.A_log.exp()[:, None]
    yield "ssm_d", mixer.D[:, None]
    yield "ssm_norm.weight", mixer.norm_weight.unflatten(0, (mixer.groups, -1))
    yield "ssm_out.weight", mixer.o_proj.weight


def _attention(mixer: Any) -> Iterator[tuple[str, Tensor]]:
    q, k = mixer.q_proj.weight, mixer.k_proj.weight
    if mixer.g_proj is not None:  # Qwen3.5: a head's query, then its gate
        gate = mixer.g_proj.weight.unflatten(0, (mixer.heads, -1))
        q = torch.cat([q.unflatten(0, (mixer.heads, -1)), gate], dim=1).flatten(0, 1)
        yield "attn_q_norm.weight", mixer.q_norm.weight + 1
        yield "attn_k_norm.weight", mixer.k_norm.weight + 1
    else:  # Llama: llama.cpp rotates neighbours, we rotate halves
        q, k = (x.unflatten(0, (-1, 2, mixer.head_dim // 2)).transpose(1, 2).flatten(0, 2) for x in (q, k))
    yield "attn_q.weight", q
    yield "attn_k.weight", k
    yield "attn_v.weight", mixer.v_proj.weight
    yield "attn_output.weight", mixer.o_proj.weight


def _gdn(mixer: Any) -> Iterator[tuple[str, Tensor]]:
    yield "attn_qkv.weight", torch.cat([mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight])
    yield "attn_gate.weight", mixer.g_proj.weight
    yield "ssm_conv1d.weight", torch.cat([mixer.q_conv, mixer.k_conv, mixer.v_conv])
    yield "ssm_dt.bias", mixer.dt_bias
    yield "ssm_a", -mixer.A_log.exp()
    yield "ssm_beta.weight", mixer.b_proj.weight
    yield "ssm_alpha.weight", mixer.a_proj.weight
    yield "ssm_norm.weight", mixer.o_norm.weight
    yield "ssm_out.weight", mixer.o_proj.weight

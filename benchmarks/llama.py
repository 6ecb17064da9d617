"""llama.cpp on the same weights: GGUF files of our models, and a context that reads tokens.

Needs `pip install '.[llama]'`, which compiles llama.cpp. Without it, `INSTALLED` is false.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo

INSTALLED = find_spec("llama_cpp") is not None and find_spec("gguf") is not None
MLP = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


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


def quantise(source: Path, target: Path, form: str) -> None:
    """Store every matrix of a float32 file, the embeddings too, as "Q8_0" or "Q4_0"."""
    llama = _library()
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.pure = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{form}"), True
    if failed := llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama_model_quantize returned {failed}")


def takes(model: zoo.Model) -> bool:
    """Return whether `write_gguf` has a form for the model."""
    return {*model.config.pattern} <= {"mamba2", "attn", "gdn"}


class Llama:
    """A GGUF file, and a context of some streams that advance together.

    Args:
        context: maximum number of tokens of a stream.
    """

    def __init__(self, file: Path, streams: int = 1, *, context: int = 4096, threads: int | None = None) -> None:
        self._llama = _library()
        self._model = self._llama.llama_model_load_from_file(str(file).encode(), self._llama.llama_model_default_params())
        options = self._llama.llama_context_default_params()
        options.n_ctx = options.n_batch = context * streams
        options.n_seq_max, options.no_perf = streams, True
        options.type_k = options.type_v = self._llama.GGML_TYPE_F32  # the attention cache, as ours
        options.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads = options.n_threads_batch = threads or torch.get_num_threads()
        self._context = self._llama.llama_init_from_model(self._model, options)
        self._memory = self._llama.llama_get_memory(self._context)
        self._words = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self.position = 0
        self.close = weakref.finalize(self, _close, self._llama, self._context, self._model)

    def clear(self) -> None:
        """Forget all tokens."""
        self._llama.llama_memory_clear(self._memory, True)
        self.position = 0

    def cut(self, position: int) -> bool:
        """Forget the tokens from a position on. Returns False if the model cannot."""
        done: bool = self._llama.llama_memory_seq_rm(self._memory, -1, position, -1)
        self.position = position if done else self.position
        return done

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [streams, T] and return the logits of the last token, [streams, V]."""
        batch, count = self._llama.llama_batch_init(ids.numel(), 0, 1), 0
        for stream, row in enumerate(ids.tolist()):
            for n, token in enumerate(row):
                batch.token[count], batch.pos[count] = token, self.position + n
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, stream
                batch.logits[count] = n == len(row) - 1
                count += 1
        batch.n_tokens = count
        failed = self._llama.llama_decode(self._context, batch)
        self._llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        self.position += ids.shape[1]
        ends: Sequence[int] = range(ids.shape[1] - 1, ids.numel(), ids.shape[1])
        rows = [np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self._context, end), shape=(self._words,)) for end in ends]
        return torch.from_numpy(np.stack(rows))

    def save(self) -> bytes:
        """Return the state of the first stream."""
        size = self._llama.llama_state_seq_get_size(self._context, 0)
        kept = (ctypes.c_uint8 * size)()
        self._llama.llama_state_seq_get_data(self._context, kept, size, 0)
        return bytes(kept)

    def restore(self, kept: bytes, position: int) -> None:
        """Continue the first stream from a state and its position."""
        self.clear()
        data = (ctypes.c_uint8 * len(kept)).from_buffer_copy(kept)
        self._llama.llama_state_seq_set_data(self._context, data, len(kept), 0)
        self.position = position


def _close(llama: Any, context: Any, model: Any) -> None:
    llama.llama_free(context)
    llama.llama_model_free(model)


@cache
def _library() -> Any:
    """Return llama.cpp's functions, silent."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp


@cache
def _silent(llama_cpp: Any) -> Any:
    return llama_cpp.llama_log_callback(lambda level, text, data: None)

"""A context of llama.cpp that reads tokens. Imports neither torch nor zoo: `benchmarks.opening` times a process that uses it.

Needs `pip install '.[llama]'`, which compiles llama.cpp. Without it, `INSTALLED` is false.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

INSTALLED = find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def quantise(source: Path, target: Path, form: str) -> None:
    """Store every matrix of a float32 file, the embeddings too, as "Q8_0" or "Q4_0"."""
    llama = _library()
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.pure = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{form}"), True
    if failed := llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama_model_quantize returned {failed}")


class Llama:
    """A GGUF file, and a context of some streams that advance together.

    Args:
        context: maximum number of tokens of a stream.
    """

    def __init__(self, file: Path | str, streams: int = 1, *, threads: int, context: int = 4096) -> None:
        self._llama = _library()
        self._model = self._llama.llama_model_load_from_file(str(file).encode(), self._llama.llama_model_default_params())
        options = self._llama.llama_context_default_params()
        options.n_ctx = options.n_batch = context * streams
        options.n_seq_max, options.no_perf = streams, True
        options.type_k = options.type_v = self._llama.GGML_TYPE_F32  # the attention cache, as ours
        options.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads = options.n_threads_batch = threads
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

    def read(self, ids: Any) -> np.ndarray:
        """Read ids [streams, T], an array or a tensor, and return the logits of the last token, [streams, V]."""
        streams, length = ids.shape
        batch, count = self._llama.llama_batch_init(streams * length, 0, 1), 0
        for stream, row in enumerate(ids.tolist()):
            for n, token in enumerate(row):
                batch.token[count], batch.pos[count] = token, self.position + n
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, stream
                batch.logits[count] = n == length - 1
                count += 1
        batch.n_tokens = count
        failed = self._llama.llama_decode(self._context, batch)
        self._llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        self.position += length
        ends: Sequence[int] = range(length - 1, streams * length, length)
        rows = [np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self._context, end), shape=(self._words,)) for end in ends]
        return np.stack(rows)

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

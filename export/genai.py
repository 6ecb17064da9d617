"""Configuration for onnxruntime-genai, which runs the prediction graph of an `ort` bundle within one window; it cannot sleep."""

from __future__ import annotations

import json

from zoo.config import ModelConfig
from zoo.export.manifest import PREDICTION
from zoo.export.ring import PAST, PRESENT
from zoo.text.tokenizers import configured_ends

GENAI = "genai_config.json"


def genai_config(config: ModelConfig, slots: int) -> str:
    """Return the JSON of genai_config.json. Tokens are read one at a time (chunk_size 1); head counts are taken from the graph's inputs."""
    decoder = {
        "filename": PREDICTION,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.pattern),
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_size": config.d_model,
        "session_options": {"provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "position_ids": "position_ids",
            "past_key_names": f"{PAST}.%d.key",
            "past_value_names": f"{PAST}.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": f"{PRESENT}.%d.key", "present_value_names": f"{PRESENT}.%d.value"},
    }
    # an end-of-stream id is mandatory; without a tokenizer, any id will do
    ends = configured_ends(config.upstream, config.vocab_size) or [config.vocab_size - 1]
    model = {
        "type": "decoder",
        "vocab_size": config.vocab_size,
        "context_length": slots,
        "bos_token_id": 0,
        "eos_token_id": ends,
        "pad_token_id": 0,
        "decoder": decoder,
    }
    search = {"max_length": slots, "chunk_size": 1, "past_present_share_buffer": True, "do_sample": False, "num_beams": 1}
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"

"""Configuration for onnxruntime-genai, which runs the prediction graph of an `ort` bundle within one window; it cannot sleep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.companions import GENERATION
from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.export.manifest import PREDICTION
from zoo.export.ring import PAST, PRESENT
from zoo.text.tokenizers import configured_ends

GENAI = "genai_config.json"


def genai_config(config: ModelConfig, slots: int, companions: Mapping[str, bytes]) -> str:
    """Return the JSON of genai_config.json. Tokens are read one at a time (chunk_size 1); head counts are taken from the graph's inputs.

    The end tokens are those of generation_config.json among the files that travel with the model, or else of the upstream config.
    Raises ZooError if that file is damaged.
    """
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
    ends = configured_ends(_generation(companions), config.vocab_size) or configured_ends(config.upstream, config.vocab_size)
    model = {
        "type": "decoder",
        "vocab_size": config.vocab_size,
        "context_length": slots,
        "bos_token_id": 0,
        "eos_token_id": ends or [config.vocab_size - 1],
        "pad_token_id": 0,
        "decoder": decoder,
    }
    search = {"max_length": slots, "chunk_size": 1, "past_present_share_buffer": True, "do_sample": False, "num_beams": 1}
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"


def _generation(companions: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields of generation_config.json; none if there is no such file."""
    try:
        fields = json.loads(companions.get(GENERATION, b"{}"))
    except ValueError as error:
        raise ZooError(f"{GENERATION}: damaged: {error}; want JSON") from None
    return fields if isinstance(fields, dict) else {}

"""Run tiny random models through transformers and store their logits: `python tests/zoo/checkpoints/make_oracles.py`.

Writes tests/data/oracles/transformers: cases.json (config.json of every case, as transformers writes it), a file of weights for every
set of cases that share them, and logits.safetensors. Needs transformers 5.23.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[2] / "data" / "oracles" / "transformers"
LENGTH = 16
"""Original context. Streams are four times as long."""
IDS = torch.randint(32, (1, 4 * LENGTH), generator=torch.Generator().manual_seed(1))

SIZE = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA = {**SIZE, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": LENGTH}
QWEN3_5 = {**LLAMA, "layer_types": ["full_attention"] * 2}
ROPE = {"rope_theta": 100.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
TRAINED = {"original_max_position_embeddings": LENGTH}

Case = tuple[str, str, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    # weights, model_type, fields, rope_parameters
    "default": ("llama", "llama", LLAMA, {"rope_type": "default"}),
    "linear": ("llama", "llama", LLAMA, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ("llama", "llama", LLAMA, {"rope_type": "dynamic", "factor": 4.0}),
    "llama3": ("llama", "llama", {**LLAMA, "max_position_embeddings": 4 * LENGTH}, {**LLAMA3, **TRAINED}),
    "llama3 without length": ("llama", "llama", LLAMA, LLAMA3),
    "yarn": ("llama", "llama", {**LLAMA, "max_position_embeddings": 4 * LENGTH}, {**YARN, **TRAINED}),
    "yarn not truncated": ("llama", "llama", LLAMA, {**YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 0.5}),
    "yarn with mscale": ("llama", "llama", LLAMA, {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}),
    "yarn with factor": ("llama", "llama", LLAMA, {**YARN, "attention_factor": 0.9}),
    "partial, ignored": ("llama", "llama", LLAMA, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "odd, ignored": ("llama", "llama", LLAMA, {"rope_type": "default", "partial_rotary_factor": 0.3}),
    "biases": ("llama with biases", "llama", {**LLAMA, "attention_bias": True}, LLAMA3),
    "qwen2": ("qwen2", "qwen2", LLAMA, {"rope_type": "default"}),
    "qwen2 yarn": ("qwen2", "qwen2", LLAMA, YARN),
    "qwen3 biases": ("qwen3", "qwen3", {**LLAMA, "attention_bias": True}, {"rope_type": "linear", "factor": 2.0}),
    "partial": ("qwen3_5", "qwen3_5_text", QWEN3_5, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "odd": ("qwen3_5", "qwen3_5_text", QWEN3_5, {"rope_type": "default", "partial_rotary_factor": 0.33}),
    "partial yarn": ("qwen3_5", "qwen3_5_text", QWEN3_5, {**YARN, "partial_rotary_factor": 0.5}),
    "odd llama3": ("qwen3_5", "qwen3_5_text", QWEN3_5, {**LLAMA3, "partial_rotary_factor": 0.33}),
    "odd dynamic": ("qwen3_5", "qwen3_5_text", QWEN3_5, {"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.33}),
    "odd linear with biases": (
        "qwen3_5 with biases",
        "qwen3_5_text",
        {**QWEN3_5, "attention_bias": True},
        {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.33},
    ),
}


def model(case: str) -> Any:
    """Build a case's model with random weights, the same for all cases that share them."""
    sys.modules["fla"] = None  # type: ignore[assignment]
    from transformers import AutoConfig, AutoModelForCausalLM

    weights, model_type, fields, rope = CASES[case]
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields, rope_parameters={**ROPE, **rope})).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in sorted(made.named_parameters()):
            weight.normal_(0, 0.15 if weight.ndim > 1 else 0.2, generator=generator)
            if weight.ndim == 1 and "norm" in name and not weights.startswith("qwen3_5"):  # whose norms add 1 themselves
                weight.add_(1)
    return made


@torch.no_grad()
def logits(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [1, T, V] of one pass over all tokens, and those token by token."""
    whole = made(IDS).logits
    steps, cache = [], None
    for token in IDS.split(1, dim=1):
        out = made(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return whole, torch.cat(steps, dim=1)


def main() -> None:
    configs, results = {}, {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case, (weights, *_) in CASES.items():
        made = model(case)
        configs[case] = {"weights": weights, "config": made.config.to_diff_dict()}
        save_file({name: x.contiguous() for name, x in made.state_dict().items()}, FOLDER / f"{weights}.safetensors")
        whole, steps = logits(model(case))
        results[case] = whole
        results[f"{case}, token by token"] = steps
    save_file(results, FOLDER / "logits.safetensors")
    (FOLDER / "cases.json").write_text(json.dumps(configs, indent=1) + "\n")


if __name__ == "__main__":
    main()

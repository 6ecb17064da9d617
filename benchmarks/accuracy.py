"""Change of the predictions of trained models with weights in 8 and 4 bits, beside llama.cpp on the same weights.

    python -m benchmarks.accuracy [STEPS]

Three models of width 256 learn the Python standard library in bytes, in build/accuracy. The KL divergence is from the predictions in
float32 to those with integer weights, the mean over 4,096 held-out tokens. The ratio is that of llama.cpp divided by ours.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import zoo
from benchmarks import stored
from benchmarks.measure import HERE, record
from zoo.export.runtime import ExportedModel
from zoo.tasks import new_task
from zoo.training.config import TrainConfig
from zoo.training.loop import train

FOLDER = HERE.parent / "build" / "accuracy"
STREAMS, TOKENS = 16, 256
TASK = {"name": "stdlib", "length": 512, "width": 256}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba-2": ("Mamba2Config", {"num_hidden_layers": 8, "num_heads": 8}),
    "GDN + attention": (
        "Qwen3_5TextConfig",
        {
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "attention": (
        "LlamaConfig",
        {"intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}


@torch.enable_grad()
def trained(name: str, steps: int) -> zoo.Model:
    """Train a model, or load the one that was trained before."""
    kind, fields = SIZES[name]
    parent, out = (FOLDER / f"{name} {what}" for what in ("untrained", f"{steps} steps"))
    if not parent.exists():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(vocab_size=256, hidden_size=256, tie_word_embeddings=True, **fields)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(parent)
    run = TrainConfig(model=str(parent), task=TASK, steps=steps, batch_size=8, lr=2e-3, warmup=0.1, eval_sequences=32)
    if not (out / "results.json").exists():
        train(run, out, report=lambda metrics: print(name, metrics.get("step"), metrics.get("loss"), flush=True))
    return zoo.load(out)


@torch.no_grad()
def main(steps: int = 300) -> None:
    rows: list[dict[str, Any]] = []
    ids, *_ = new_task(TASK).batch(0, 0, STREAMS, "test")
    ids, following = torch.from_numpy(ids[:, :TOKENS]), torch.from_numpy(ids[:, 1 : TOKENS + 1])
    for name in SIZES:
        model = trained(name, steps)
        exact = model(ids).logits.double().log_softmax(-1)
        rows.append({"case": f"{name}, float32: bits per byte", "unit": "", "times": {"ours": [bits(exact, following)] * 3}, "ratios": {}})
        with tempfile.TemporaryDirectory() as scratch:
            stored.write(model, Path(scratch), stored.FORMS, 2 * TOKENS)
            for form in ("Q8_0", "Q4_0"):
                found = {"ours": ours(ExportedModel(Path(scratch) / form), ids)}
                if (peer := stored.in_llama(Path(scratch), form, STREAMS, 2 * TOKENS)) is not None:
                    found["llama.cpp"] = torch.stack([torch.from_numpy(peer.read(token)) for token in ids.split(1, dim=1)], dim=1)
                rows += compared(f"{name}, {form}", exact, following, found)
    record("accuracy", rows)


def ours(model: ExportedModel, ids: Tensor) -> Tensor:
    return model(ids, model.init_state(len(ids))).logits


def compared(case: str, exact: Tensor, following: Tensor, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the rows of each measure for one form of integer weights."""
    predicted = {name: logits.double().log_softmax(-1) for name, logits in found.items()}
    measures = {
        "KL divergence": {name: divergence(exact, p) for name, p in predicted.items()},
        "bits per byte": {name: bits(p, following) for name, p in predicted.items()},
        "same first choice, %": {name: 100 * (p.argmax(-1) == exact.argmax(-1)).double().mean().item() for name, p in predicted.items()},
    }
    rows = []
    for measure, values in measures.items():
        row: dict[str, Any] = {"case": f"{case}: {measure}", "unit": "", "times": {name: [value] * 3 for name, value in values.items()}}
        row["ratios"] = {name: [value / values["ours"]] * 3 for name, value in values.items() if name != "ours"}
        row |= {"target": 1 / 1.05} if measure == "KL divergence" else {}
        rows.append(row | ({} if "llama.cpp" in values else {"problems": {"llama.cpp": "not installed"}}))
    return rows


def divergence(exact: Tensor, predicted: Tensor) -> float:
    """Return the mean KL divergence of log-probabilities [B, T, V]."""
    return F.kl_div(predicted, exact, log_target=True, reduction="none").sum(-1).mean().item()


def bits(predicted: Tensor, following: Tensor) -> float:
    """Return the mean bits per byte of log-probabilities [B, T, V]."""
    return -predicted.gather(-1, following[..., None].long()).mean().item() / np.log(2)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

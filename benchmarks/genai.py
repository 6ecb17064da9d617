"""Cost of a predicted token in a session on the `ort` graphs, compared with onnxruntime-genai on the same graph.

python -m benchmarks.genai
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.decode import PROMPT, TOKENS, ours
from benchmarks.measure import compare, record
from zoo.export.bundle import export
from zoo.export.plan import Plan
from zoo.export.runtime import ExportedModel

FIELDS: dict[str, Any] = {
    "layers": "(gdn*3 attn)*2",
    "d_model": 512,
    "d_ff": 1536,
    "vocab_size": 32000,
    "window": 512,
    "blocks": {"attn": {"heads": 4}, "gdn": {"heads": 4}},
}


def genai(folder: Path, prompt: Tensor) -> Callable[[], Tensor] | None:
    """Return a function that generates the next TOKENS greedy tokens, [1, TOKENS], after `prompt`; None if genai is not installed."""
    if find_spec("onnxruntime_genai") is None:
        return None
    runtime = importlib.import_module("onnxruntime_genai")
    model = runtime.Model(str(folder))
    params = runtime.GeneratorParams(model)
    params.set_search_options(max_length=FIELDS["window"])
    generator = runtime.Generator(model, params)
    generator.append_tokens(prompt.int().numpy())

    def generate() -> Tensor:
        for _ in range(TOKENS):
            generator.generate_next_token()
        return torch.tensor(generator.get_sequence(0)[-TOKENS:])[None]

    return generate


@torch.no_grad()
def main() -> None:
    model = zoo.create("gdn4-sleep4", **FIELDS).requires_grad_(False)
    prompt = torch.randint(FIELDS["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        for dialect in ("ort", "portable"):
            export(model, Path(scratch) / dialect, plan=Plan(dialect=dialect), verified=False)  # type: ignore[arg-type]
        contenders = {
            "ours": ours(ExportedModel(Path(scratch) / "ort"), prompt),
            "onnxruntime-genai": genai(Path(scratch) / "ort", prompt),
            "ours, portable": ours(ExportedModel(Path(scratch) / "portable"), prompt),
            "PyTorch": ours(model, prompt),
        }
        record("genai", [compare("GDN + attention 50M, batch 1", contenders, rounds=5, per=TOKENS, target=1.2, tolerance=0)])


if __name__ == "__main__":
    main()

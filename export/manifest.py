"""The manifest of a bundle, bundle.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from zoo.config import ModelConfig, validate
from zoo.errors import ZooError
from zoo.export.plan import Plan

FORMAT: Literal[3] = 3
"""Before 3, prediction.onnx took one position for all streams; before 2, linear layers were [out, in], and prefill.onnx returned the
logits of all tokens."""
MANIFEST, WEIGHTS = "bundle.json", "weights.bin"
PREDICTION, PREFILL, CONSOLIDATION = "prediction.onnx", "prefill.onnx", "consolidation.onnx"
HEAD = "head.onnx"  # logits of all tokens of a piece, which prefill.onnx does not compute
SLEEPING = "sleeping.onnx"  # all of them in one, for hosts that only carry its states
PRELUDE, PASS, CODA = "prelude.onnx", "pass.onnx", "coda.onnx"  # a sleep for hosts that stop between passes


class TensorSpec(BaseModel):
    """One input or output of a graph. A dynamic dimension is given by name."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphSpec(BaseModel):
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class EngineSpec(BaseModel):
    """Record of how a TensorRT engine was built, for which GPUs, and the warnings of the build."""

    built_by: str
    compute_capability: list[str]
    batch: tuple[int, int, int]
    layers: int
    seconds: float
    warnings: list[str]

    def __str__(self) -> str:
        low, preferred, high = self.batch
        gpus = ", ".join(self.compute_capability) or "its default"
        warnings = "".join(f"\n  warning: {warning}" for warning in self.warnings)
        return (
            f"{self.layers} layers in {self.seconds:.1f} s by {self.built_by}, compute capability {gpus}, "
            f"batch {low} to {high}, optimized for {preferred}{warnings}"
        )


class Bundle(BaseModel):
    """Contents of bundle.json. `window` (slots of a ring), `loops` and `evict` repeat the config for readers without this package."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[3] = FORMAT
    config: ModelConfig
    window: int
    loops: int
    evict: str
    opset: int
    precision: Literal["float32", "float16", "bfloat16"]
    plan: Plan
    fingerprint: str
    """Fingerprint of the weights; session files can move between all forms of one model."""
    graphs: dict[str, GraphSpec]
    engines: dict[str, EngineSpec] = {}
    versions: dict[str, str]
    sha256: dict[str, str]

    def write(self, folder: Path) -> None:
        fields = self.model_dump(mode="json", exclude={"config"}) | {"config": self.config.model_dump(mode="json", exclude_defaults=True)}
        (folder / MANIFEST).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Bundle:
        """Read the manifest in `folder` and verify the checksum of every file.

        Raises:
            ZooError: there is no bundle, or a file is missing, damaged or from another bundle.
        """
        file = folder / MANIFEST
        try:
            fields: Any = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise ZooError(f"{folder}: no {MANIFEST} here; want a folder written by zoo-export") from None
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{file}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ZooError(f"{file}: want a mapping of fields")
        if (written := fields.get("format", FORMAT)) != FORMAT:
            raise ZooError(f"{file}: format: {written}; want {FORMAT}: export the model again")
        bundle = validate(Bundle, fields, str(file))
        for name in {*bundle.graphs, WEIGHTS, *bundle.sha256}:
            if not (folder / name).is_file():
                raise ZooError(f"{folder / name}: is missing")
            if digest(folder / name) != bundle.sha256.get(name):
                raise ZooError(f"{folder / name}: does not match {MANIFEST} (sha256 differs)")
        return bundle


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""bundle.json: what a bundle is made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from zoo.config import ModelConfig, validate
from zoo.errors import ZooError
from zoo.export.plan import Plan

MANIFEST, WEIGHTS = "bundle.json", "weights.bin"
PREDICTION, PREFILL, CONSOLIDATION = "prediction.onnx", "prefill.onnx", "consolidation.onnx"
PRELUDE, PASS, CODA = "prelude.onnx", "pass.onnx", "coda.onnx"  # a sleep for a host that stops between passes


class TensorSpec(BaseModel):
    """One input or output of a graph; a dimension that may vary is a word."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphSpec(BaseModel):
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class EngineSpec(BaseModel):
    """What a TensorRT engine was built by and for, and what the build said."""

    built_by: str
    compute_capability: list[str]
    batch: tuple[int, int, int]
    layers: int
    seconds: float
    warnings: list[str]

    def __str__(self) -> str:
        low, preferred, high = self.batch
        place = ", ".join(self.compute_capability) or "its default"
        said = "".join(f"\n  warning: {warning}" for warning in self.warnings)
        return (
            f"{self.layers} layers in {self.seconds:.1f} s by {self.built_by}, compute capability {place}, "
            f"batch {low} to {high}, best at {preferred}{said}"
        )


class Bundle(BaseModel):
    """What bundle.json says. `window` (slots of a ring), `loops` and `evict` are for readers that know nothing of this package."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    config: ModelConfig
    window: int
    loops: int
    evict: str
    opset: int
    precision: Literal["float32", "float16", "bfloat16"]
    plan: Plan
    fingerprint: str
    """Of the weights: a session's file belongs to every form of one model."""
    graphs: dict[str, GraphSpec]
    engines: dict[str, EngineSpec] = {}
    versions: dict[str, str]
    sha256: dict[str, str]

    def write(self, folder: Path) -> None:
        fields = self.model_dump(mode="json", exclude={"config"}) | {"config": self.config.model_dump(mode="json", exclude_defaults=True)}
        (folder / MANIFEST).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Bundle:
        """The bundle in `folder`, all of its files as they were written.

        Raises:
            ZooError: no bundle there, or a file that is missing, damaged, or of another bundle.
        """
        file = folder / MANIFEST
        try:
            fields: Any = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise ZooError(f"{folder}: no {MANIFEST} here; want a folder written by zoo-export") from None
        except ValueError as error:
            raise ZooError(f"{file}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ZooError(f"{file}: want a mapping of fields")
        bundle = validate(Bundle, fields, str(file))
        for name in {*bundle.graphs, WEIGHTS, *bundle.sha256}:
            if not (folder / name).is_file():
                raise ZooError(f"{folder / name}: is missing")
            if digest(folder / name) != bundle.sha256.get(name):
                raise ZooError(f"{folder / name}: is not the file that {MANIFEST} speaks of (sha256 differs)")
        return bundle


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

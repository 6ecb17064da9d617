"""What a bundle is written for: the graphs alone, or with what one runtime needs beside them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from zoo.export.manifest import Bundle
from zoo.export.plan import Plan
from zoo.registry import Registry


class Target(BaseModel):
    """`onnx`: the graphs alone. The base of every target; its fields are what a user may ask of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def check(self, precision: str, plan: Plan) -> None:
        """ZooError, before any work, for what this target cannot do here."""

    def build(self, folder: Path, bundle: Bundle) -> Bundle:
        """Write further files beside the graphs in `folder`. Returns the bundle with what it now holds, sha256 of them included."""
        return bundle


targets: Registry[type[Target]] = Registry("export target", "targets", "zoo.export.*.target")
targets.register("onnx", Target)

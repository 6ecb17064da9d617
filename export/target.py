"""Export targets: the graphs alone, or with additional files for one runtime."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from zoo.export.manifest import Bundle
from zoo.export.plan import Plan
from zoo.registry import Registry


class Target(BaseModel):
    """The target `onnx`, the graphs alone, and the base class of all targets. Fields are the options of the target."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gathers_integers: ClassVar[bool] = True
    """True if the rows of a table of integers can be looked up before they are dequantised."""
    shares_integers: ClassVar[bool] = True
    """True if a Loop and the nodes after it may read the same integers."""

    def check(self, precision: str, plan: Plan) -> None:
        """Raise a ZooError, before any work starts, for anything that this target cannot do on this machine."""

    def build(self, folder: Path, bundle: Bundle) -> Bundle:
        """Write additional files to `folder`. Returns the updated bundle, with their sha256."""
        return bundle


targets: Registry[type[Target]] = Registry("export target", "targets", "zoo.export.*.target")
targets.register("onnx", Target)

"""One stage in a process of its own: python -m benchmarks.gpu.stage NAME FILE [--dry]"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.sheet import Case, Sheet


def tools(names: tuple[str, ...]) -> list[Case]:
    """Return a case whose row names the modules that are not installed here; none if there are all."""
    lacking = [name for name in names if find_spec(name) is None]
    return [("tools", lambda: {"note": f"not installed: {', '.join(lacking)}"})] if lacking else []


def main(name: str, file: str, *options: str) -> None:
    dry = "--dry" in options
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    path = Path(file)
    Sheet(path, dry).fill([*tools(module.TOOLS), *module.cases(dry, path.parent)])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A model zoo of language models that sleep. The public names are listed in `__init__.pyi` and imported on first use."""

import ast
import importlib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

if (_here := Path(__file__).parent).joinpath("blocks").is_file():  # a checkout without symbolic links
    __path__.append(str(_here.parent))

__version__ = version("sleep-zoo")


def _load_lazily(package: ModuleType) -> None:
    """Make the names that a package's stub imports available in the package, each imported on first use (PEP 562)."""
    stub = ast.parse(Path(package.__path__[0], "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    public = sorted(alias.name for node in imports for alias in node.names)
    home = {alias.name: str(node.module) for node in imports if node.module != package.__name__ for alias in node.names}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(package, name, value)
        return value

    package.__dict__.update(__getattr__=get, __dir__=lambda: public, __all__=public)


# kernels/ and export/ have no __init__.py: a top-level `kernels` package would shadow Hugging Face's
for _name in ("zoo", "zoo.kernels", "zoo.export"):
    _load_lazily(importlib.import_module(_name))

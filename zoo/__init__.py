"""A model zoo for language models that sleep. Nothing heavy is imported before it is used."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if (_here := Path(__file__).parent).joinpath("blocks").is_file():  # a checkout without symbolic links
    __path__.append(str(_here.parent))

import zoo.export
import zoo.kernels

if TYPE_CHECKING:
    from zoo.config import ModelConfig as ModelConfig
    from zoo.config import list_models as list_models
    from zoo.costs import describe as describe
    from zoo.kernels.registry import ZooError as ZooError
    from zoo.model import Answers as Answers
    from zoo.model import Model as Model
    from zoo.model import Output as Output
    from zoo.model import State as State
    from zoo.pool import PoolFullError as PoolFullError
    from zoo.pool import SessionPool as SessionPool
    from zoo.session import Session as Session
    from zoo.weights import create as create
    from zoo.weights import load as load
    from zoo.weights import save as save


def _hand_on(module: ModuleType, names: dict[str, str]) -> None:
    """Let `module` answer for names that live elsewhere, imported at first use (PEP 562)."""

    def answer(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(names[name]), name)
        setattr(module, name, value)
        return value

    module.__dict__["__getattr__"] = answer
    module.__dict__["__all__"] = list(names)


_hand_on(
    importlib.import_module(__name__),
    {
        "Answers": "zoo.model",
        "Model": "zoo.model",
        "ModelConfig": "zoo.config",
        "Output": "zoo.model",
        "PoolFullError": "zoo.pool",
        "Session": "zoo.session",
        "SessionPool": "zoo.pool",
        "State": "zoo.model",
        "ZooError": "zoo.kernels.registry",
        "create": "zoo.weights",
        "describe": "zoo.costs",
        "list_models": "zoo.config",
        "load": "zoo.weights",
        "save": "zoo.weights",
    },
)
# the floors have no __init__.py of their own: a top-level `kernels` package would shadow Hugging Face's
_hand_on(zoo.kernels, {"use": "zoo.kernels.dispatch"})
_hand_on(zoo.export, {"export": "zoo.export.bundle", "load": "zoo.export.runtime"})

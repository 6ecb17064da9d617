"""Every shipped configuration compiles, for GPUs that are not present, to the resources stamped on its row of tuned.json."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kernels.aot import Compiler
from zoo.kernels import tuning
from zoo.kernels.dispatch import kernels


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()


def marked(row: tuning.Row) -> Any:
    return pytest.param(row, id=tuning.row_name(row), marks=[] if row["arch"] == 90 else [pytest.mark.extended])


@pytest.mark.parametrize("row", [marked(row) for row in tuning.table()])
def test_a_shipped_configuration(row: tuning.Row, compiler: Callable[[tuning.Row], dict[str, Any]]) -> None:
    found, stamp = compiler(row), row["compiled"]
    assert not found["faults"]
    assert found["spills"] == 0 or row.get("may_spill"), "registers spill"
    if found["triton"] == stamp["triton"]:
        for resource in ("registers", "shared"):
            assert abs(found[resource] - stamp[resource]) <= 0.1 * stamp[resource], f"{resource}: {found}; if wanted, stamp the row anew"


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    covered = {(row["kernel"], row["arch"]) for row in tuning.table()}
    for name in kernels.names():
        operator, form = name.split(".")
        if form == "triton":
            import importlib

            from triton.runtime.interpreter import InterpretedFunction

            module = importlib.import_module(f"zoo.kernels.{operator}.triton")
            launched = {key for key, value in vars(module).items() if isinstance(value, InterpretedFunction) and not key.startswith("_")}
            for kernel in launched:
                for arch in tuning.ARCHITECTURES:
                    assert (f"{operator}.{kernel}", arch) in covered


def test_rows_are_told_apart_by_their_names() -> None:
    names = [tuning.row_name(row) for row in tuning.table()]
    assert len(set(names)) == len(names)

"""The package as users install it: a wheel in a fresh environment, outside the checkout, beside other packages."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("blocks", "configs", "export", "kernels")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with the wheel and Hugging Face's `kernels`, which can import our dependencies."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch is too large to install twice
    for arguments in (["--no-deps", str(ROOT)], ["kernels"]):
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "--quiet", "--no-warn-script-location", *arguments],
            check=True,
            cwd=home,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
    return home


def run(environment, *command, status=0):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([environment / "bin" / command[0], *command[1:]], cwd=environment, env=clean, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_is_what_runs(environment):
    """And leaves Hugging Face's `kernels` importable beside it."""
    code = "import kernels, zoo, zoo.blocks.gdn; print(zoo.__file__, zoo.blocks.gdn.__file__, *dir(kernels))"
    code += "; from zoo.kernels.cpu.build import HERE; assert len(list(HERE.glob('*.cpp'))) == 3"
    package, block, *theirs = run(environment, "python", "-c", code).split()
    assert str(environment) in package
    assert str(environment) in block
    assert "get_kernel" in theirs


def test_no_generic_name_is_installed(environment):
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    for floor in FLOORS:
        if floor != "kernels":
            assert not (site / floor).exists()


def test_the_commands(environment):
    """As programs, and most of them in one process, which imports torch once."""
    assert "gdn4" in run(environment, "zoo", "list", "gdn*")
    (environment / "run.yaml").write_text(
        "model: gdn4-sleep2\noverrides: {layers: gdn, d_model: 16, window: 5}\ntask: {name: cycle, nodes: 5, hops: 1}\n"
        "steps: 2\nbatch_size: 4\neval_sequences: 4\n"
    )
    code = """
import zoo
from click.testing import CliRunner
from zoo.cli import main
for name in (None, "list", "describe", "train", "eval", "demo", "chat", "serve"):
    assert "Usage:" in CliRunner().invoke(main, [*filter(None, [name]), "--help"]).output
assert "3.70 M" in str(zoo.describe(zoo.create("gdn4-sleep4")))
for line in (
    "train run.yaml --out run",
    "train cycle steps=1 batch_size=2 eval_sequences=2 overrides.d_model=16",
    "eval run --sequences 4",
):
    main(line.split(), standalone_mode=False)
"""
    run(environment, "python", "-c", code)
    run(environment, "zoo-export", "gdn4", "layers=gdn", "d_model=16", "--max-length", "5", "--prefill", "0", "--out", "bundle")
    assert {p.name for p in (environment / "bundle").iterdir()} == {"bundle.json", "prediction.onnx", "weights.bin"}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_is_a_link_without_an_init(floor):
    """An __init__.py would make `kernels` in the checkout hide Hugging Face's package."""
    assert (ROOT / "zoo" / floor).resolve() == ROOT / floor
    assert not (ROOT / floor / "__init__.py").exists()


def test_every_folder_with_code_is_packaged():
    import tomllib

    packaged = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    for top in ("zoo", "blocks", "export", "kernels"):
        for file in (ROOT / top).rglob("*.py"):
            if not any(part.startswith((".", "__pycache__")) for part in file.relative_to(ROOT).parts):
                package = ".".join(file.relative_to(ROOT).parent.parts)
                assert (package if top == "zoo" else f"zoo.{package}") in packaged

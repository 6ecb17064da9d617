"""The package as users install it: a wheel in a fresh environment, outside the checkout, beside other packages."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("blocks", "configs", "export", "kernels")

TOY = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "toy-mixer"
version = "1"
[project.entry-points.zoo_blocks]
decay = "toy_mixer:Decay"
[project.entry-points.zoo_models]
toy4 = "toy_mixer:TOY4"
[project.entry-points.zoo_schedules]
halves = "toy_mixer:Halves"
[project.entry-points.zoo_tasks]
copy = "toy_training:Copy"
[project.entry-points.zoo_optimizers]
sgd = "toy_training:sgd"
[tool.setuptools]
py-modules = ["toy_mixer", "toy_training"]
""",
    "toy_mixer.py": '''
import torch
from pydantic import Field
from zoo.blocks.mixer import Mixer, Options
from zoo.schedule import Schedule

class DecayOptions(Options):
    rate: float = Field(0.5, gt=0, lt=1)

class Decay(Mixer):
    """A running average of the tokens; the average is the fast weight."""
    Options = DecayOptions
    def __init__(self, d_model, options, reach):
        super().__init__(d_model, options, reach)
        self.rate = options.rate
        self.o_proj = torch.nn.Linear(d_model, d_model, bias=False)
    def new_fast(self, batch):
        return self.zeros(batch, self.o_proj.in_features, fast=True)
    def forward(self, x, fast, window, positions):
        out = []
        for t in range(x.shape[1]):
            fast = self.rate * fast + (1 - self.rate) * x[:, t]
            out.append(fast)
        return self.o_proj(torch.stack(out, 1).to(x.dtype)), fast, window

class Halves(Schedule):
    """When half of the window is full."""
    def due(self, window):
        return window // 2

TOY4 = {"name": "toy4", "vocab_size": 5, "d_model": 16, "layers": "(attn decay)*2", "sleep": {"evict": "hard", "window": 8}}
''',
}

# the examples of CONTRIBUTING.md, which an entry point registers instead of a decorator
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
TOY["toy_training.py"] = "\n".join(
    [
        "import numpy as np, torch",
        "from pydantic import Field",
        "from zoo.tasks import Batch, Task",
        *(
            re.sub(r"^@.*", "", example, flags=re.MULTILINE)
            for example in EXAMPLES
            if '@tasks.register("' in example or "@optimizers" in example
        ),
    ]
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with the wheel, Hugging Face's `kernels` and the toy package, which can import our dependencies."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch is too large to install twice
    toy = tmp_path_factory.mktemp("toy")
    for name, text in TOY.items():
        (toy / name).write_text(text)
    for arguments in (["--no-deps", str(ROOT), str(toy)], ["kernels"]):
        subprocess.run(
            [home / "bin/python", "-m", "pip", "install", "--quiet", "--no-warn-script-location", *arguments],
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
    where = run(environment, "python", "-c", "import zoo, zoo.blocks.gdn; print(zoo.__file__, zoo.blocks.gdn.__file__)").split()
    assert all(str(environment) in path for path in where)


def test_no_generic_name_is_installed(environment):
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    for floor in FLOORS:
        if floor != "kernels":
            assert not (site / floor).exists()
    assert "get_kernel" in run(environment, "python", "-c", "import zoo.blocks.gdn, kernels; print(dir(kernels))")


def test_the_commands(environment):
    code = "import zoo; print(zoo.describe(zoo.create('gdn4-sleep4')))"
    assert "3.70 M" in run(environment, "python", "-c", code)
    assert "gdn4" in run(environment, "zoo", "list", "gdn*")
    for command in (
        ["zoo"],
        ["zoo", "list"],
        ["zoo", "describe"],
        ["zoo", "train"],
        ["zoo", "eval"],
        ["zoo", "demo"],
        ["zoo", "chat"],
        ["zoo", "serve"],
        ["zoo-export"],
    ):
        assert "Usage:" in run(environment, *command, "--help")
    (environment / "run.yaml").write_text(
        "model: gdn4-sleep2\noverrides: {layers: attn gdn, d_model: 16, window: 5}\ntask: {name: cycle, nodes: 5, hops: 1}\n"
        "steps: 2\nbatch_size: 4\neval_sequences: 4\n"
    )
    run(environment, "zoo", "train", "run.yaml", "--out", "run")
    run(environment, "zoo", "train", "cycle", "steps=1", "batch_size=2", "eval_sequences=2")
    run(environment, "zoo", "eval", "run", "--sequences", "4")
    run(environment, "zoo-export", "run", "--target", "onnx", "--out", "bundle")
    assert {p.name for p in (environment / "bundle").iterdir()} == {"bundle.json", "prediction.onnx", "consolidation.onnx", "weights.bin"}


def test_a_mixer_of_another_package(environment):
    """An entry point is all it takes: the mixer works in any pattern, and sleeps."""
    code = """
import torch, zoo
model = zoo.create("gdn4-sleep3-hard8", layers="attn decay gdn decay", d_model=16, blocks={"decay": {"rate": 0.9}})
state = model.consolidate(torch.zeros(2, 8, dtype=torch.long))
assert state.fast[1].abs().sum() > 0
mask = torch.zeros(2, 12, dtype=torch.bool); mask[:, 9:] = True
model.loss(torch.zeros(2, 12, dtype=torch.long), mask).backward()
assert "toy4" in zoo.list_models()
assert zoo.create("toy4-sleep2").config.window == 8
session = zoo.Session(model, when="halves")
session.feed(torch.zeros(1, 9, dtype=torch.long))
assert session.stats().sleeps == 2
try:
    zoo.create("gdn4", layers="decai")
except zoo.ZooError as error:
    assert "did you mean 'decay'" in str(error)
else:
    raise AssertionError
"""
    run(environment, "python", "-c", code)


def test_a_task_and_an_optimiser_of_another_package(environment):
    """Entry points are all it takes: `zoo train` learns the one with the other, and refuses what they would."""
    (environment / "copy.yaml").write_text(
        "model: gdn4-sleep2-hard4\noverrides: {layers: attn gdn, d_model: 16}\ntask: {name: copy, length: 4}\n"
        "optimizer: sgd\nlr: 0.1\nsteps: 40\nlog_every: 40\nbatch_size: 16\neval_sequences: 16\n"
    )
    first, last = (
        float(re.search(r"loss ([\d.]+)", run(environment, "zoo", "train", "copy.yaml", f"steps={n}", "--out", f"copied-{n}"))[1])
        for n in (1, 40)
    )
    assert last < first - 0.05
    assert "copy length=4" in run(environment, "zoo", "eval", "copied-40", "--sequences", "4")
    for wrong in ("task.length=0", "optimizer=sdg", "lr=-1"):
        run(environment, "zoo", "train", "copy.yaml", wrong, "--out", "refused", status=2)
    assert not (environment / "refused").exists()


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


def test_readme_example_runs():
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""The examples of CONTRIBUTING.md as an installed package, registered by decorators and entry points at once."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(python|toml)\n(?:# (\S+)\n)?(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
FILES = {name: text for _, name, text in BLOCKS}
PROJECT = tomllib.loads(FILES.pop("pyproject.toml"))["project"]
GROUPS = PROJECT["entry-points"]
EVERY_MODULE = "import " + ", ".join(sorted(name.removesuffix(".py").replace("/", ".") for name in FILES)) + "\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package as pip installs it. Commands find it on PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    info = site / f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n")
    lines = (line for group, points in GROUPS.items() for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items())))
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


# a command line as in a shell, but in this process, which imports torch once
COMMAND = """
import shlex

def command(line):
    from zoo.cli import main as zoo
    from zoo.export.cli import main as zoo_export

    program, *arguments = shlex.split(line)
    {"zoo": zoo, "zoo-export": zoo_export}[program](arguments, standalone_mode=False)

"""


# Runs each program that arrives in a fork, beside which torch is imported already.
SERVER = """
import json, os, sys, traceback
import torch, zoo.cli
zoo.create

for line in sys.stdin:
    folder, code = json.loads(line)
    if os.fork() == 0:
        os.chdir(folder)
        file = os.open("output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = 1
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def environment(site):
    """The environment of a process in which the package is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def server(environment):
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Run a program in an empty folder, beside the installed package. Returns what it prints."""

    def run(code):
        server.stdin.write(json.dumps([str(tmp_path), code]) + "\n")
        server.stdin.flush()
        status, output = server.stdout.readline(), (tmp_path / "output").read_text()
        assert status == "0\n", output
        (tmp_path / "output").unlink()
        return output

    return run


def test_every_kind_has_an_example():
    """Of the twelve rows of the table, each names its entry point groups, and each group has an example."""
    rows = re.findall(r"^\| an? .*\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) == 12
    assert sorted(re.findall(r"`(zoo_\w+)`", "".join(rows))) == sorted(GROUPS)
    named = {value.split(":")[0].replace(".", "/") + ".py" for points in GROUPS.values() for value in points.values()}
    assert named == set(FILES) - {"toyzoo/leaky_sum/example.py"}


def test_listing_models_imports_neither_torch_nor_plugins(environment):
    def run(*arguments):
        return subprocess.run([sys.executable, "-c", *arguments], env=environment, capture_output=True, text=True, check=True).stdout

    code = "import sys; from zoo.cli import main; main(sys.argv[1:], standalone_mode=False); print({'torch', 'toyzoo'} & set(sys.modules))"
    assert run(code, "list", "toy*").split() == ["toy4", "set()"]
    assert "set()" in run(code, "--help")


@pytest.mark.parametrize("imported", [False, True])
def test_every_name_is_found(run, imported):
    """The modules imported first, as a script does, or found by their entry points alone."""
    code = f"""
from zoo.blocks.mixer import mixers as zoo_blocks
from zoo.blocks.mlp import mlps as zoo_mlps
from zoo.kernels.dispatch import kernels as zoo_kernels, operators as zoo_operators
from zoo.config import models as zoo_models
from zoo.eviction import evictions as zoo_evictions
from zoo.schedule import schedules as zoo_schedules
from zoo.tasks import tasks as zoo_tasks
from zoo.training.optimizers import optimizers as zoo_optimizers
from zoo.training.trackers import trackers as zoo_trackers
from zoo.checkpoints.family import families as zoo_checkpoints
from zoo.export.target import targets as zoo_targets
from zoo.export.runtime import providers as zoo_providers
import pkgutil
for group, points in {GROUPS}.items():
    for name, value in points.items():
        registry = globals()[group]
        assert name in registry.names()
        assert registry.get(name) is registry.get(name) is pkgutil.resolve_name(value)
"""
    run(EVERY_MODULE * imported + code)


def test_a_block(run):
    """The conformance suite, on the mixer that only the environment adds."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "decay", "--rootdir", str(ROOT), str(ROOT / "tests/blocks/test_conformance.py")]
    output = run(f"import pytest; assert pytest.main({options}) == 0")
    assert int(re.search(r"(\d+) passed", output)[1]) >= 24


def test_a_kernel(run):
    """The checks of every form, and the self-check of `zoo doctor`."""
    code = """
import torch, zoo
from tests.kernels.checking import check_compiled, check_gradients, check_operator
from zoo import doctor
from zoo.kernels.common.examples import example
from zoo.kernels.dispatch import kernels, operators
leaky_sum, forms = operators.get("leaky_sum"), ("reference", "chunked")
for T in (1, 2, 17, 64, 65):
    inputs = example("leaky_sum", T=T, batch=2, dtype=torch.float64)
    for decay in (inputs["decay"], torch.ones(8), torch.full((8,), 1e-3)):
        check_operator(kernels.get("leaky_sum.chunked"), kernels.get("leaky_sum.reference"), {**inputs, "decay": decay})
check_gradients(leaky_sum, example("leaky_sum", T=9, dtype=torch.float64))
check_compiled(leaky_sum, example("leaky_sum", T=9))
for form in forms:
    with zoo.kernels.use(form):
        assert leaky_sum(**example("leaky_sum", T=9)).shape == (1, 9, 8)
operators.names = lambda: ["leaky_sum"]  # the others have tests of their own
assert doctor.run()
"""
    output = run(code)
    assert output.count("ok    leaky_sum: ") == 2


def test_a_model_an_eviction_policy_and_a_schedule(run):
    """Described, saved, loaded and put to sleep."""
    code = """
import torch, zoo
command("zoo describe toy4-sleep2")
ids = torch.arange(20)[None] % 16
model, half = zoo.create("toy4-sleep2"), zoo.create("toy4-sleep2", evict="half")
for i, made in enumerate((model, half)):
    zoo.save(made, f"saved{i}")
    loaded = zoo.load(f"saved{i}")
    assert loaded.config == made.config and loaded.config.window == 8
    assert torch.equal(loaded(ids[:, :8]).logits, made(ids[:, :8]).logits)
    session = zoo.Session(loaded)
    session.feed(ids)
    assert session.stats().sleeps == 2
kept = half.consolidate(ids[:, :8]).window[0]
assert kept.key.shape[2] == half.eviction.kept(8) == 4
session = zoo.Session(model, when="fraction(0.5)")
session.feed(ids)
assert session.stats().sleeps == 4
try:
    zoo.Session(model, when="fraction(2)")
except zoo.ZooError as error:
    assert str(error).startswith("fraction: 2")
else:
    raise AssertionError
"""
    assert "toy4-sleep2" in run(COMMAND + code)


def test_a_task_an_optimiser_and_a_tracker(run, tmp_path):
    """`zoo train` learns the one with the other, refuses what they refuse, and reports to the third; `zoo eval` evaluates."""
    (tmp_path / "run.yaml").write_text(
        "model: toy4-sleep2\noverrides: {evict: half, window: 4}\ntask: {name: copy, length: 4}\n"
        "optimizer: sgd\nlr: 0.3\nsteps: 60\nlog_every: 60\nbatch_size: 16\neval_sequences: 16\n"
    )
    code = """
command("zoo train run.yaml steps=1 --out first")
command("zoo train run.yaml --track notes --track toyzoo.tracker:Notes --out last")
command("zoo eval last --sequences 4")
for wrong in ("task.length=0", "optimizer=sdg"):
    try:
        command(f"zoo train run.yaml {wrong} --out refused")
    except SystemExit as refused:
        assert refused.code == 2
    else:
        raise AssertionError
"""
    output = run(COMMAND + code)
    first, last = map(float, re.findall(r"step \d+/\d+ loss ([\d.]+)", output))
    assert last < first - 0.05
    assert "copy length=4" in output
    title, *rest = sorted((tmp_path / "last/notes.txt").read_text().splitlines(), reverse=True)
    assert re.fullmatch(r"last [0-9a-f]{16}: 60 steps", title)
    assert rest == [title, *[f"60: loss {last:.3f}"] * 2]
    assert not (tmp_path / "refused").exists()


def test_a_checkpoint_family(run):
    """Upstream's folder is loaded, sleeps, and is written back bit for bit by `zoo convert`."""
    code = """
import json, pathlib, torch, zoo
from safetensors.torch import load_file, save_file
V, D, F = 16, 8, 24
shapes = {"embedding.weight": (V, D), "norm.weight": (D,), "logits.weight": (V, D)}
for i in range(2):
    mlp = {"mlp.gate": (F, D), "mlp.up": (F, D), "mlp.down": (D, F)}
    shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in {"norm1": (D,), "norm2": (D,), "average": (D, D), **mlp}.items()}
theirs, copy = pathlib.Path("theirs"), pathlib.Path("copy")
theirs.mkdir()
config = {"model_type": "toyzoo", "vocab_size": V, "width": D, "mlp_width": F, "depth": 2}
(theirs / "config.json").write_text(json.dumps(config))
save_file({name: torch.randn(shape) for name, shape in shapes.items()}, theirs / "model.safetensors", metadata={"format": "pt"})
command("zoo convert theirs copy --to hf")
before, after = (load_file(folder / "model.safetensors") for folder in (theirs, copy))
assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
assert json.loads((copy / "config.json").read_text()) == config
model = zoo.load(theirs)
assert model.config.layers == "decay*2"
zoo.save(zoo.create(model.config, evict="hard", window=4, loops=2), "ours")
session = zoo.Session(zoo.load("ours"))
session.feed(torch.arange(10)[None])
assert session.stats().sleeps == 2
"""
    run(COMMAND + code)


def test_an_export_target_and_a_provider(run, tmp_path):
    code = """
import torch, zoo
command("zoo-export toy4-sleep2 layers=decay window=4 --target labelled --no-verify --out bundle")
session = zoo.export.load("bundle", provider="counted")
session.feed(torch.arange(6)[None])
assert session.stats().sleeps == 1
assert session.model._graphs["consolidation.onnx"].runs == 1
"""
    run(COMMAND + code)
    assert (tmp_path / "bundle/LABEL").read_text().split() == ["prediction.onnx", "prefill.onnx", "head.onnx", "consolidation.onnx"]


def test_the_example_of_the_readme(run):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    run(code)

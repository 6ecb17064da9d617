"""The direction of imports: each layer imports only from those below it, and no module imports itself through others."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("blocks", "export", "kernels")  # top-level folders that are imported as zoo.<folder>
LAYERS = (
    ("zoo.errors",),
    ("zoo.registry",),
    ("zoo.kernels",),
    ("zoo.blocks",),
    (
        "zoo.console",
        "zoo.devices",
        "zoo.dtypes",
        "zoo.files",
        "zoo.layer_pattern",
        "zoo.options",
        "zoo.eviction",
        "zoo.schedule",
        "zoo.signals",
        "zoo.system",
    ),
    ("zoo.config", "zoo.state"),
    ("zoo.inputs", "zoo.loss", "zoo.model", "zoo.stack"),
    ("zoo.initialise", "zoo.products"),
    ("zoo.checkpoints", "zoo.factory"),
    ("zoo.costs", "zoo.facets"),
    ("zoo.text",),
    ("zoo.tasks",),
    ("zoo.sessions",),
    ("zoo.training",),
    ("zoo.serving",),
    ("zoo.export",),
    ("zoo.integrations",),
    ("zoo.doctor", "zoo.demo", "zoo.publish"),
    ("zoo.cli", "zoo.export.cli"),
    ("zoo.__main__",),
)


def modules():
    """Every module of the package: its name and its file."""
    for top in ("zoo", *LINKED):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if top == "zoo" and len(parts) > 1 and parts[1] in (*LINKED, "configs"):
                continue  # the links
            name = ".".join(parts if top == "zoo" else ("zoo", *parts)).removesuffix(".__init__")
            yield name, file


FILES = dict(modules())


def imported(node):
    """The modules of ours that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        names = []
    for name in names:
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        if name.startswith("zoo."):
            yield name


@functools.cache
def imports(name):
    """What a module imports: (module, whether it happens when this one is imported, whether it is for types alone)."""
    found = []
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in tree.body:
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        lazy = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node):
            for other in imported(inner):
                found.append((other, not lazy, typing_only))
    return found


def layer(name):
    """The place of the longest entry of LAYERS that the module is, or is in."""
    return max((len(top), i) for i, names in enumerate(LAYERS) for top in names if name == top or name.startswith(f"{top}."))[1]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_only_from_its_own_layer_and_those_below(name):
    if name == "zoo":  # imports its sub-packages to list their names
        return
    for other, _, _ in imports(name):
        assert layer(other) <= layer(name), f"{name} imports {other}"


def test_no_module_imports_itself_through_others():
    graph = {name: {other for other, now, types in imports(name) if now and not types and other != name} for name in FILES if name != "zoo"}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph.get(name, ())):
            visit(other)
        done.add(path.pop())

    for name in graph:
        visit(name)


def test_every_file_of_a_layer_is_known():
    """A test that reads no files cannot fail."""
    assert {"zoo.model", "zoo.kernels.gated_delta_rule.op", "zoo.export.tensorrt.target", "zoo.blocks.gdn"} <= set(FILES)
    assert {"zoo.loss"} <= {other for other, _, _ in imports("zoo.model")}


def test_a_model_is_made_and_run_without_what_only_compilation_needs():
    """sympy alone takes more than a second to import."""
    code = """
import sys, torch, zoo
model = zoo.create("gdn4-sleep2-hard5", d_model=64)
ids = torch.ones(1, 9, dtype=torch.int64)
list(zoo.Session(model).generate(ids, 3))
model.loss(ids, torch.arange(9)[None] > 6).backward()
print(*({"sympy", "torch._dynamo", "torch._inductor", "transformers", "matplotlib"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"

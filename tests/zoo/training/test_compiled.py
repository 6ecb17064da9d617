"""Training with compiled blocks is training with plain ones, up to rounding."""

from functools import partial

import pytest
import torch

import zoo
from tests.zoo.training.tiny import check_resumes, tiny
from zoo.errors import ZooError
from zoo.training.loop import train
from zoo.training.prepare import prepare

PROBLEMS = {"name": "gsm-infinite", "quantities": 3, "operations": 2, "shortest": 100, "longest": 300, "width": 60}
CPU = torch.device("cpu")


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.extended)])
def backend(request, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": {"layers": "attn gdn jet", "d_model": 16, "d_ff": 16}},
        {"overrides": {"layers": "mamba2 swa", "d_model": 32, "d_ff": 16, "evict": "sliding"}},
        {"task": PROBLEMS, "model": "gdn4-sleep2-hard60"},
    ],
    ids=["fixed sizes", "sliding", "any size"],
)
def test_losses_are_those_of_plain_blocks(tmp_path, backend, changes):
    losses = []
    for compile in (False, True):
        config, lines = tiny(steps=5, lr=1e-2, compile=compile, **changes), []
        train(config, tmp_path / str(compile), report=lines.append)
        losses.append([line["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    weights = [zoo.load(tmp_path / name).state_dict() for name in ("False", "True")]
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=1e-2)


def test_resumes_bit_for_bit(tmp_path, backend):
    # without what was compiled, as in another process
    check_resumes(tiny(steps=6, compile=True, checkpoint_every=100), tmp_path, stops=5, before=torch.compiler.reset)


def test_what_cannot_be_compiled_is_refused(monkeypatch, tmp_path):
    experts = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "mlp": "moe"}
    with pytest.raises(ZooError, match=r"compile: true; .* has a mixture of experts"):
        train(tiny(compile=True, overrides=experts), tmp_path / "run")
    with pytest.raises(ZooError, match="compile: true; compiled blocks recompute no activations"):
        tiny(compile=True, recompute="passes")
    with pytest.raises(ZooError, match="compile: true; products in bfloat16 may run in float32, uncompiled; want dtype: float32"):
        tiny(compile=True, dtype="bfloat16")

    def fails(x):
        raise RuntimeError("no working C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", lambda run, **how: fails)
    with pytest.raises(ZooError, match=r"compile: true; torch.compile fails: RuntimeError: no working C\+\+ compiler; want false"):
        train(tiny(compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_of_the_compiler_are_named(monkeypatch, tmp_path):
    def backend(graph, inputs):
        if len(graph.graph.nodes) > 5:
            raise ImportError("main.so: file too short\nsecond line")
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(ZooError, match=r"compile: true; torch.compile fails: ImportError: main.so: file too short; want false$"):
        train(tiny(compile=True), tmp_path / "run")


def test_one_process_alone(monkeypatch):
    from zoo.training.parallel import Team

    team = Team(CPU)
    monkeypatch.setattr(team, "size", 2)
    monkeypatch.setattr(team, "parallelize", lambda model, strategy: model.answers)
    with pytest.raises(ZooError, match="compile: true; only training in one process is compiled, not in 2"):
        prepare(tiny(compile=True), CPU, team)

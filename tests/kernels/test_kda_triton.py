"""The Triton form of Kimi Delta Attention, interpreted, against the float64 step recurrence."""

import functools
from unittest import mock

import pytest
import torch
from torch import Tensor

import zoo
from tests.kernels import test_kda
from tests.kernels.checking import Fences, check_compiled, check_gradients, check_operator, fenced, relative
from tests.kernels.interpreter import rehearse
from tests.kernels.test_gated_delta_rule_triton import shipped
from zoo.kernels import tuning
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.kda import triton as kernels
from zoo.kernels.kda.op import kda

run = functools.partial(kda, form="triton", output_final_state=True)
reference = functools.partial(kda, form="reference", output_final_state=True)
check = functools.partial(check_operator, run, reference, wide=("g", "beta", "initial_state"))
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def inputs(T: int, *, B: int = 1, H: int = 1, K: int = 16, V: int = 16, ends: tuple[int, ...] = (), **fields: float) -> dict[str, Tensor]:
    """ends: where packed sequences end."""
    given = dict(zip(NAMES, test_kda.inputs(T, B=B, H=H, K=K, V=V, **fields), strict=True))
    if ends:
        given["initial_state"] = torch.cat([given["initial_state"] * factor for factor in range(1, len(ends) + 1)])
        given["cu_seqlens"] = torch.tensor((0, *ends), dtype=torch.int32)
    return given


CASES = {
    "one token": {"T": 1, "B": 2},
    "a token less than a chunk": {"T": 63},
    "several chunks": {"T": 130, "H": 2},
    "odd sizes": {"T": 66, "K": 24, "V": 40, "B": 2},
    "few keys": {"T": 3, "K": 4, "V": 4},
    "sizes of several tiles": {"T": 66, "K": 72, "V": 72},
    "no decay, full strength": {"T": 66, "K": 32, "V": 32, "decay": 0.0, "beta": 2.0},
    "strong decay": {"T": 66, "decay": 30.0},
    "equal keys, beta near 2": {"T": 66, "K": 32, "V": 32, "correlated": 0.5, "beta": 1.9, "decay": 1e-3},
    "packed": {"T": 67, "H": 2, "ends": (65, 66, 67)},
    "packed, of one token each": {"T": 3, "ends": (1, 2, 3)},
}


@pytest.mark.parametrize("case", CASES)
def test_in_float64(case: str) -> None:
    check(inputs(**CASES[case]))


@pytest.mark.parametrize("case", ["strong decay", "equal keys, beta near 2", "packed"])
def test_in_bfloat16(case: str) -> None:
    with rehearse(tf32=True):
        check(inputs(**CASES[case]), dtype=torch.bfloat16)


@pytest.mark.extended
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_other_dtypes(case: str, dtype: torch.dtype) -> None:
    with rehearse(tf32=True):
        check(inputs(**CASES[case]), dtype=dtype)


def test_extreme_decays() -> None:
    """Every channel decays by another order of magnitude, and some tokens decay everything."""
    given = dict(zip(NAMES, (x[:1, :, :1] if x.ndim < 4 or x.shape[1] == 70 else x[:1, :1] for x in test_kda.extreme(70)), strict=True))
    check(given)


@pytest.mark.parametrize("spike", [10, pytest.param(1000, marks=pytest.mark.extended), 100_000])
def test_small_decays_after_a_strong_one_in_some_channels(spike: int) -> None:
    """As exact as without the strong one, whose size a difference of running sums would round to."""
    given = inputs(64, correlated=0.9, beta=0.9, decay=1e-3, K=32, V=32)
    given["g"][:, 5, :, ::3] = -spike
    check(given, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize(("K", "V"), [(16, 256), (256, 16), (128, 64)])
def test_sizes_up_to_256(K: int, V: int) -> None:
    check(inputs(65, K=K, V=V))


def test_states_computed_again_by_programs_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SAVE_AT_MOST", 0)
    with rehearse(backwards=True):
        check(inputs(**CASES["packed"], K=24, V=24))


def test_equal_decays_are_the_gated_delta_rule() -> None:
    """In results and gradients, of which that of a decay is the sum over its channels."""

    def rule(g: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(**given, g=g, form="triton", output_final_state=True)

    def channels(g: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        return run(**given, g=g[..., None].expand_as(given["k"]))

    given = inputs(66, H=2, K=24)
    given["g"] = given["g"][..., 0]
    check_operator(channels, rule, given)


@pytest.mark.parametrize("tiles", shipped("kda"))
def test_tiles_that_are_shipped(tiles: str) -> None:
    row = shipped("kda")[tiles]
    size = 16 + max(size for name, size in row["config"].items() if name.startswith("B"))  # one whole tile and a part of one
    with tuning.forced(row):
        if row["kernel"] != "kda.step":
            check(inputs(34, K=size, V=size))
        else:
            given = inputs(1, K=size, V=size)
            for found, wanted in zip(run(**given), reference(**given), strict=True):
                assert relative(found, wanted) < 1e-12


def test_chunks_of_32() -> None:
    """As on an A100."""
    with mock.patch.object(tuning, "target", return_value=80):
        check(inputs(67, K=24, ends=(33, 34, 67)))


def test_one_result_alone() -> None:
    """The other has no gradient, not one of zeros."""
    check_operator(lambda **x: run(**x)[0], lambda **x: reference(**x)[0], inputs(34))
    check_operator(lambda **x: run(**x)[1], lambda **x: reference(**x)[1], inputs(34))


def test_parts_of_a_wider_tensor() -> None:
    """q, k, v as they leave a convolution of all three."""

    def split(mixed: Tensor, g: Tensor, beta: Tensor, form: str) -> tuple[Tensor, Tensor]:
        heads = (x.unflatten(-1, (2, -1)) for x in mixed.split([32, 32, 48], dim=-1))
        return kda(*heads, g=g, beta=beta, form=form, output_final_state=True)

    given = inputs(34, B=2, H=2)
    mixed = 0.2 * torch.randn(2, 34, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = {"mixed": mixed, "g": given["g"], "beta": given["beta"]}
    check_operator(functools.partial(split, form="triton"), functools.partial(split, form="reference"), names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token without gradients takes a kernel of its own, which keeps every digit of the state."""
    given = inputs(1, B=3, H=2, K=24, V=40)
    given = {name: fenced(x.to(dtype if name in ("q", "k", "v") or dtype == torch.float64 else torch.float32)) for name, x in given.items()}
    monkeypatch.setattr(kernels, "whole", None)
    with Fences():
        o, final = run(**given)
    want, want_final = reference(**{name: x.double() for name, x in given.items()})
    assert relative(o, want) < (1e-12 if dtype == torch.float64 else 2e-3)
    assert relative(final, want_final) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.extended
@pytest.mark.parametrize("ends", [(), (1, 66)], ids=["rows", "packed"])
def test_gradcheck(ends: tuple[int, ...]) -> None:
    check_gradients(run, inputs(66, ends=ends))


@pytest.mark.extended
def test_the_library_operator() -> None:
    given = inputs(70, ends=(5, 70))
    leaves = [given[name].requires_grad_() for name in NAMES]
    torch.library.opcheck(kernels.whole.op, (*leaves, given["cu_seqlens"], 0.25, True))


@pytest.mark.extended
def test_in_one_compiled_graph() -> None:
    check_compiled(run, inputs(66))


@pytest.mark.extended
def test_as_one_node_of_an_exported_graph() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            return kda(q, k, v, g=g, beta=beta, form="triton")[0]

    given = {name: x for name, x in inputs(66, B=3).items() if name != "initial_state"}
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Module(), tuple(given.values()), dynamic_shapes={name: {0: batch} for name in given})
    assert sum("zoo.kda" in str(node.target) for node in program.graph.nodes) == 1
    given = {name: x for name, x in inputs(66, B=2).items() if name != "initial_state"}
    torch.testing.assert_close(program.module()(*given.values()), reference(**given)[0])


@pytest.mark.extended
def test_a_step_of_training_as_the_reference_does() -> None:
    """A small model that sleeps has the same loss and gradients through the kernels."""
    found = {}
    for form in ("reference", "triton"):
        model = zoo.create("gdn4-sleep2-hard6", vocab_size=11, d_model=16, layers="attn kda", blocks={"kda": {"heads": 1}}, seed=0)
        ids = torch.randint(11, (1, 20), generator=torch.Generator().manual_seed(0))
        mask = torch.arange(20)[None] >= 12
        with zoo.kernels.use(form):
            loss = model.loss(ids, mask)
            loss.backward()
        found[form] = [loss.detach(), *(x.grad for x in model.parameters() if x.grad is not None)]
    assert len(found["triton"]) > 10
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-5)

"""The Triton form of the gated delta rule, interpreted, against the float64 step recurrence."""

import functools
from unittest import mock

import pytest
import torch
from torch import Tensor

import zoo
from tests.kernels.checking import Fences, check_compiled, check_gradients, check_operator, fenced, relative
from tests.kernels.interpreter import rehearse
from zoo.kernels import tuning
from zoo.kernels.gated_delta_rule import triton as kernels
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.tasks import new_task

run = functools.partial(gated_delta_rule, form="triton", output_final_state=True)
reference = functools.partial(gated_delta_rule, form="reference", output_final_state=True)
check = functools.partial(check_operator, run, reference, wide=("g", "beta", "initial_state"))


def inputs(
    T: int, *, B: int = 1, H: int = 1, HV: int | None = None, K: int = 16, V: int = 16, correlated: float = 0.0, beta: float | None = None,
    decay: float = 0.05, ends: tuple[int, ...] | None = None, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """`correlated` in [0, 1]: 1 makes all keys equal. ends: where packed sequences end."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    HV = HV or H
    k = (1 - correlated) * randn(B, T, H, K) + correlated * randn(B, 1, H, K)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (randn(B, T, H, K), k))
    strength = torch.full((B, T, HV), beta, dtype=torch.float64) if beta is not None else randn(B, T, HV).sigmoid()
    given = {"q": q, "k": k, "v": randn(B, T, HV, V), "g": -decay * randn(B, T, HV).exp(), "beta": strength}
    given["initial_state"] = randn(len(ends) if ends else B, HV, K, V)
    if ends:
        given["cu_seqlens"] = torch.tensor((0, *ends), dtype=torch.int32)
    return given


CASES = {
    "one token": {"T": 1, "B": 2},
    "a token less than a chunk": {"T": 63},
    "a token more than a chunk": {"T": 65, "B": 2},
    "several chunks": {"T": 200},
    "grouped heads": {"T": 70, "H": 2, "HV": 6, "B": 2},
    "odd sizes": {"T": 66, "K": 24, "V": 40},
    "sizes of several tiles": {"T": 66, "K": 96, "V": 72},
    "no decay, full strength": {"T": 66, "K": 32, "V": 32, "decay": 0.0, "beta": 2.0},
    "strong decay": {"T": 66, "decay": 30.0},
    "equal keys, beta near 1": {"T": 66, "correlated": 0.95, "beta": 0.97, "decay": 1e-3},
    "equal keys, beta near 2": {"T": 66, "K": 32, "V": 32, "correlated": 0.5, "beta": 1.9, "decay": 1e-3},
    "packed": {"T": 200, "H": 1, "HV": 2, "ends": (70, 71, 199, 200)},
    "packed, of one token each": {"T": 3, "ends": (1, 2, 3)},
}


@pytest.mark.parametrize("case", CASES)
def test_in_float64(case: str) -> None:
    check(inputs(**CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_in_bfloat16(case: str) -> None:
    with rehearse(tf32=True):
        check(inputs(**CASES[case]), dtype=torch.bfloat16)


@pytest.mark.parametrize("case", ["grouped heads", "equal keys, beta near 2", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_other_dtypes(case: str, dtype: torch.dtype) -> None:
    with rehearse(tf32=True):
        check(inputs(**CASES[case]), dtype=dtype)


@pytest.mark.parametrize(("K", "V"), [(16, 256), (256, 16), (128, 64)])
def test_sizes_up_to_256(K: int, V: int) -> None:
    check(inputs(65, K=K, V=V))


@pytest.mark.parametrize("case", ["grouped heads", "packed"])
def test_states_computed_again(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SAVE_AT_MOST", 0)
    check(inputs(**CASES[case]))


def test_programs_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SAVE_AT_MOST", 0)
    with rehearse(backwards=True):
        check(inputs(**CASES["packed"], K=40, V=40))


@pytest.mark.parametrize("spike", [10, 1000, 100_000])
def test_small_decays_after_a_strong_one(spike: int) -> None:
    """As exact as without the strong one, whose size a difference of running sums would round to."""
    given = inputs(64, correlated=0.9, beta=0.9, decay=1e-3, K=32, V=32)
    given["g"][:, 5] = -spike
    check(given, dtype=torch.float32, tolerance=1e-5)


def test_chunks_of_32() -> None:
    """As on an A100."""
    with mock.patch.object(tuning, "target", return_value=80):
        check(inputs(70, K=24))
        check(inputs(67, HV=2, ends=(33, 34, 67)))


def shipped(operator: str) -> dict[str, tuning.Row]:
    """One row for each way to cut the work of a kernel into tiles."""
    mine = [row for row in tuning.table() if row["kernel"].startswith(f"{operator}.") and row["dtype"] == "bfloat16"]
    tiles = {}
    for row in mine:
        sizes = {name: size for name, size in row["config"].items() if name.startswith("B")}
        tiles[f"{row['kernel']} {sizes}"] = row
    return tiles


@pytest.mark.parametrize("tiles", shipped("gated_delta_rule"))
def test_tiles_that_are_shipped(tiles: str) -> None:
    row = shipped("gated_delta_rule")[tiles]
    size = 16 + max(size for name, size in row["config"].items() if name.startswith("B"))  # one whole tile and a part of one
    with tuning.forced(row):
        if row["kernel"] != "gated_delta_rule.step":
            check(inputs(66, K=size, V=size))
        else:
            given = inputs(1, K=size, V=size)
            for found, wanted in zip(run(**given), reference(**given), strict=True):
                assert relative(found, wanted) < 1e-12


def test_one_result_alone() -> None:
    """The other has no gradient, not one of zeros."""
    check_operator(lambda **x: run(**x)[0], lambda **x: reference(**x)[0], inputs(66))
    check_operator(lambda **x: run(**x)[1], lambda **x: reference(**x)[1], inputs(66))


def test_parts_of_a_wider_tensor() -> None:
    """q, k, v as they leave a convolution of all three."""

    def split(mixed: Tensor, g: Tensor, beta: Tensor, form: str) -> tuple[Tensor, Tensor]:
        q, k, v = mixed.split([32, 32, 48], dim=-1)
        heads = (x.unflatten(-1, (2, -1)) for x in (q, k, v))
        return gated_delta_rule(*heads, g=g, beta=beta, form=form, output_final_state=True)

    given = inputs(66, B=2, H=2)
    mixed = 0.2 * torch.randn(2, 66, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = {"mixed": mixed, "g": given["g"], "beta": given["beta"]}
    check_operator(functools.partial(split, form="triton"), functools.partial(split, form="reference"), names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("HV", "K", "V"), [(2, 24, 40), (4, 16, 16)])
@torch.no_grad()
def test_a_step(HV: int, K: int, V: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token without gradients takes a kernel of its own, which keeps every digit of the state."""
    given = inputs(1, B=3, H=2, HV=HV, K=K, V=V)
    given = {name: fenced(x.to(dtype if name in ("q", "k", "v") or dtype == torch.float64 else torch.float32)) for name, x in given.items()}
    monkeypatch.setattr(kernels, "whole", None)
    with Fences():
        o, final = run(**given)
    want, want_final = reference(**{name: x.double() for name, x in given.items()})
    assert relative(o, want) < (1e-12 if dtype == torch.float64 else 2e-3)
    assert relative(final, want_final) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("ends", [pytest.param(None, marks=pytest.mark.extended), (1, 66)], ids=["rows", "packed"])
def test_gradcheck(ends: tuple[int, ...] | None) -> None:
    check_gradients(run, inputs(66, HV=2, ends=ends))


@pytest.mark.parametrize("ends", [pytest.param(None, marks=pytest.mark.extended), (5, 70)], ids=["rows", "packed"])
def test_the_library_operator(ends: tuple[int, ...] | None) -> None:
    """On sequences of as many chunks as are allocated for: opcheck compares every output, even parts that are never written or read."""
    given = inputs(70, HV=2, ends=ends)
    leaves = [x.requires_grad_() for name, x in given.items() if name != "cu_seqlens"]
    torch.library.opcheck(kernels.whole.op, (*leaves, given.get("cu_seqlens"), 0.25, True))
    torch.library.opcheck(kernels.whole.op, (*leaves, given.get("cu_seqlens"), 0.25, False), test_utils="test_faketensor")


def test_in_one_compiled_graph() -> None:
    check_compiled(run, inputs(66, HV=2))


def test_as_one_node_of_an_exported_graph() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            return gated_delta_rule(q, k, v, g=g, beta=beta, form="triton")[0]

    given = {name: x for name, x in inputs(66, B=3).items() if name != "initial_state"}
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Module(), tuple(given.values()), dynamic_shapes={name: {0: batch} for name in given})
    assert sum("zoo.gated_delta_rule" in str(node.target) for node in program.graph.nodes) == 1
    given = {name: x for name, x in inputs(66, B=2).items() if name != "initial_state"}
    torch.testing.assert_close(program.module()(*given.values()), reference(**given)[0])


def test_training_on_rule110_as_the_reference_does() -> None:
    """A small gdn4 that sleeps takes the same steps through the kernels."""
    task = new_task({"name": "rule110", "width": 6, "strings": 2, "steps": 2})
    losses = {}
    for form in ("reference", "triton"):
        model = zoo.create("gdn4-sleep2-hard6", vocab_size=3, d_model=16, layers="attn gdn", blocks={"gdn": {"heads": 1, "value_heads": 2}})
        optimizer, losses[form] = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        with zoo.kernels.use(form):
            for step in range(2):
                ids, mask, _ = map(torch.from_numpy, task.batch(0, step, 2))
                loss = model.answers(ids, mask).losses().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[form].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], abs=1e-5, rel=0)
    assert abs(losses["triton"][1] - losses["triton"][0]) > 1e-2

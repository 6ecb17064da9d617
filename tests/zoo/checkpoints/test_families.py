"""Hybrids of tests/data/oracles asleep, in pools and as graphs; and tiny models that transformers makes and reads."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zoo
from tests.naive_families import NaiveFamily
from tests.zoo.checkpoints.test_upstream import ORACLES, tolerance
from zoo.blocks.moe import Router
from zoo.checkpoints.upstream import read_config

NAMES = (
    *("bamba-a", "falcon-h1-a", "falcon-mamba-a", "gdn-kimi-linear-a", "gdn-olmo-hybrid-a", "gdn-qwen3_5-moe-a", "gdn-qwen3next-moe-a"),
    *("granite-a", "jamba-a", "lfm2-a", "lfm2-moe-a", "nemotron-h-a", "recurrent-gemma-a"),
)
WITHOUT_FAST_WEIGHTS = ("lfm2-a", "lfm2-moe-a")


def policies(name: str) -> list[str]:
    return ["sliding"] if name in WITHOUT_FAST_WEIGHTS else ["hard", "sliding"]


SLEEPS = [(name, evict) for name in NAMES for evict in policies(name)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "evict"), SLEEPS)
def test_a_sleep_is_that_of_the_equations(name: str, evict: str) -> None:
    """Three passes of a span that is neither all layers nor begins with the first."""
    model = zoo.load(ORACLES / name, dtype="float64", evict=evict, window=4, loops=3, span=(1, 2))
    stream, state = NaiveFamily(model), None
    ids = torch.arange(3, 14)[None]
    for chunk in (ids[:, :4], ids[:, 4:8]):
        stream.asleep(chunk[0])
        state = model.consolidate(chunk, state)
    want = stream.awake(ids[0, 8:])
    torch.testing.assert_close(model(ids[:, 8:], state).logits[0], want, rtol=0, atol=1e-9 * max(1.0, want.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if "state_layer" in load_file(ORACLES / name / "io.safetensors")])
def test_fast_weights_and_routes(name: str) -> None:
    io, model = load_file(ORACLES / name / "io.safetensors"), zoo.load(ORACLES / name)
    routes: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, output: routes.append(output))
    state = model(io["input_ids"]).state
    if "recurrent_state" in io:
        want = io["recurrent_state"]
        layers = [(kind, fast) for kind, fast in zip(model.config.pattern, state.fast, strict=True) if fast is not None]
        errors = [((fast.mT if kind in ("mamba2", "parallel") else fast) - want).abs().max().item() for kind, fast in layers]
        assert min(errors) < tolerance(name, want)
    if "router_indices" in io:
        weights, indices = (torch.stack(parts) for parts in zip(*routes, strict=True))
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(indices.gather(-1, order), io["router_indices"])
        torch.testing.assert_close(weights, io["router_weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Some of its tensors are zero."""
    model = zoo.create(read_config(ORACLES / name))
    zoo.save(model, tmp_path / "x", format="hf")
    got = zoo.load(tmp_path / "x").state_dict()
    assert all(torch.equal(got[tensor], value) for tensor, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.extended
@pytest.mark.parametrize(("name", "evict"), SLEEPS)
def test_streams_in_a_pool(name: str, evict: str) -> None:
    model = zoo.load(ORACLES / name, evict=evict, window=6, loops=2)
    ids = torch.randint(256, (1, 23), generator=torch.Generator().manual_seed(0))
    with zoo.SessionPool(model) as pool:
        streams = [pool.open() for _ in range(2)]
        for stream, prompt in zip(streams, (ids, ids[:, :9]), strict=True):
            session = zoo.Session(model)
            assert list(stream.generate(prompt, tokens=6)) == list(session.generate(prompt, tokens=6))
            assert session.stats().sleeps > 0


@torch.no_grad()
@pytest.mark.extended
@pytest.mark.parametrize("dialect", ["portable", "ort"])
@pytest.mark.parametrize(("name", "evict"), SLEEPS)
def test_graphs(name: str, evict: str, dialect: str, tmp_path: Path) -> None:
    from zoo.export.plan import Plan

    model = zoo.load(ORACLES / name, evict=evict, window=6, loops=3, span=(1, 2))
    zoo.export.export(model, tmp_path / "bundle", plan=Plan(dialect=dialect))
    ids = torch.randint(256, (2, 27), generator=torch.Generator().manual_seed(0))
    got, in_float32 = zoo.export.load(tmp_path / "bundle", batch_size=2).feed(ids), zoo.Session(model, 2).feed(ids)
    want = zoo.Session(model.double(), 2).feed(ids)
    rounding = (in_float32 - want).abs().max().item()  # some of these models amplify it a thousandfold
    torch.testing.assert_close(got.double(), want, rtol=0, atol=max(1e-4 * max(1.0, want.std().item()), 10 * rounding))


SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 8, "num_hidden_layers": 3}
GRANITE: dict[str, Any] = {
    **{"embedding_multiplier": 3.0, "logits_scaling": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
    **{"shared_intermediate_size": 40, "layer_types": ["mamba", "attention", "mamba"]},
}
FALCON_H1: dict[str, Any] = {
    **{"num_hidden_layers": 3, "mamba_n_heads": 6, "mamba_d_ssm": 48, "mamba_d_state": 8, "mamba_d_conv": 3},
    **{"embedding_multiplier": 2.5, "lm_head_multiplier": 0.4, "key_multiplier": 0.6, "attention_in_multiplier": 0.8},
    **{"attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.3, "mlp_multipliers": [0.7, 0.5]},
    "ssm_multipliers": [0.4, 0.3, 0.6, 0.5, 1.2],
}
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "granite dense": ("granitemoehybrid", {**MAMBA2, **GRANITE, "num_local_experts": 0, "time_step_limit": [0.1, 0.5]}),
    "granite of attention": (
        "granitemoehybrid",
        {**MAMBA2, **GRANITE, "num_local_experts": 0, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
    ),
    "granite with experts": ("granitemoehybrid", {**MAMBA2, **GRANITE, "num_local_experts": 4, "intermediate_size": 24}),
    "jamba with experts": (
        "jamba",
        {
            **{"num_experts": 4, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "intermediate_size": 24},
            "num_experts_per_tok": 3,
        },
    ),
    "jamba dense": (
        "jamba",
        {"num_experts": 1, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "tie_word_embeddings": True},
    ),
    "bamba with biases": (
        "bamba",
        {**MAMBA2, "attn_layer_indices": [1], "mamba_n_groups": 2, "mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True},
    ),
    "falcon-h1 with norm and biases": (
        "falcon_h1",
        {
            **FALCON_H1,
            **{"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2, "mamba_proj_bias": True, "mlp_bias": True},
            **{"attention_bias": True, "head_dim": 12, "rope_theta": 1e11, "tie_word_embeddings": True, "time_step_limit": [0.1, 0.5]},
        },
    ),
    "falcon-h1 with norm before the gate": (
        "falcon_h1",
        {
            **FALCON_H1,
            **{"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_d_ssm": None, "mamba_n_heads": 8},
            **{"projectors_bias": True, "mamba_conv_bias": False, "head_dim": 12},
        },
    ),
    "falcon-h1 without factors": ("falcon_h1", {"num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_ssm": 24, "mamba_d_state": 8}),
    "falcon-mamba with biases": (
        "falcon_mamba",
        {"num_hidden_layers": 2, "intermediate_size": 64, "state_size": 8, "use_bias": True, "use_conv_bias": False, "mixer_rms_eps": 1e-5},
    ),
    "olmo that rotates": (
        "olmo_hybrid",
        {"num_hidden_layers": 4, "attention_bias": True, "linear_num_value_heads": 8, "pad_token_id": 0, "eos_token_id": 1},
    ),
    "qwen3-next in part": (
        "qwen3_next",
        {
            **{"num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"shared_expert_intermediate_size": 24, "mlp_only_layers": [1], "attention_bias": True, "norm_topk_prob": False},
        },
    ),
    "qwen3.5 with experts": (
        "qwen3_5_moe_text",
        {
            **{"num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "shared_expert_intermediate_size": 24,
        },
    ),
    "kimi linear with biases": (
        "kimi_linear",
        {
            **{"num_hidden_layers": 5, "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
            **{"v_head_dim": 6, "linear_head_dim": 8, "linear_num_heads": 3, "n_shared_experts": 2, "num_local_experts": 4},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]},
            **{"attention_bias": True, "norm_topk_prob": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        },
    ),
    "nemotron with latent experts": (
        "nemotron_h",
        {
            **{"layers_block_type": ["mamba", "mlp", "attention", "moe", "mamba", "mamba", "moe"], "head_dim": 8, "mamba_num_heads": 6},
            **{"mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 16},
            **{"moe_shared_expert_intermediate_size": 24, "moe_latent_size": 12, "use_bias": True, "mlp_bias": True},
        },
    ),
    "recurrent-gemma that is wide": (
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 7, "attention_bias": True, "head_dim": 16},
    ),
    "lfm2 with biases": ("lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True}),
    "lfm2-moe without correction": (
        "lfm2_moe",
        {
            **{"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_experts": 4},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "use_expert_bias": False, "routed_scaling_factor": 1.5},
        },
    ),
}


def randomised(made: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, x in [*made.named_parameters(), *made.named_buffers()]:
        if x.is_floating_point() and x.ndim and not name.endswith(("inv_freq", "mup_vector")):
            x.data.copy_(torch.randn(x.shape, generator=generator) * (0.3 if x.ndim == 1 else x.shape[-1] ** -0.5))
            if name.endswith("norm.weight") and "Qwen" not in type(made).__name__:
                x.data.add_(1)
    return made


@pytest.mark.extended
@pytest.mark.parametrize("case", MADE)
def test_beside_transformers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, gradients, and folders in the form of transformers 5, both ways."""
    monkeypatch.setitem(sys.modules, "fla", None)  # type: ignore[arg-type]
    import transformers

    kind, fields = MADE[case]
    theirs = randomised(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **{**SIZE, **fields})).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.load(tmp_path / "theirs")
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(1))  # 0 is padding there: its embedding has no gradient
    want, got = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance("gdn", want))

    zoo.save(ours, tmp_path / "ours", format="hf")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "ours")]
    assert configs[0] == configs[1]

    # a config.json written anew, as for a model that was made here
    upstream = {key: value for key, value in ours.config.upstream.items() if key in ("model_type", "zoo_form")}
    anew = zoo.Model(ours.config.model_copy(update={"upstream": upstream}))
    anew.load_state_dict(ours.state_dict())
    zoo.save(anew, tmp_path / "anew", format="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "anew", dtype=torch.float32).eval()
    torch.testing.assert_close(again(ids).logits, want)

    # gradients of the tensors in a file, by their names
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss(want).backward()
    loss(got).backward()
    with torch.no_grad():
        for x in (*theirs.parameters(), *ours.parameters()):
            x.copy_(torch.zeros_like(x) if x.grad is None else x.grad)
    theirs.save_pretrained(tmp_path / "their gradients")
    zoo.save(ours, tmp_path / "our gradients", format="hf")
    theirs_by_name, ours_by_name = (load_file(tmp_path / f"{whose} gradients" / "model.safetensors") for whose in ("their", "our"))
    buffers = ("e_score_correction_bias", "expert_bias")
    for name, gradient in theirs_by_name.items():
        if not name.endswith(buffers):
            error = (ours_by_name[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-4, (name, error)


@torch.no_grad()
@pytest.mark.extended
@pytest.mark.parametrize("case", MADE)
def test_bfloat16_beside_transformers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL divergence from float64 of a checkpoint in bfloat16: at most 1.1 times that of transformers.

    The mean is over 8,192 positions without the largest twentieth: those where rounding changes the choice of a router that is
    undecided between two experts, on both sides equally often.
    """
    monkeypatch.setitem(sys.modules, "fla", None)  # type: ignore[arg-type]
    import transformers

    kind, fields = MADE[case]
    made = randomised(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **{**SIZE, **fields})))
    made.bfloat16().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", experts_implementation="eager").eval()
    ours = zoo.load(tmp_path)
    assert ours.embed.weight.dtype == theirs.dtype == torch.bfloat16
    ids = torch.randint(1, 64, (128, 64), generator=torch.Generator().manual_seed(1))
    exact = zoo.load(tmp_path, dtype="float64")(ids).logits.log_softmax(-1)

    def error(model: torch.nn.Module) -> torch.Tensor:
        divergence = (exact.exp() * (exact - model(ids).logits.double().log_softmax(-1))).sum(-1).flatten()
        return divergence.sort().values[: -len(divergence) // 20].mean()

    assert 0 < error(ours) < 1.1 * error(theirs)

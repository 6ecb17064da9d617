"""LoRA: adapters by their formula, merged weights, runs that resume, and formats of others."""

import json
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import zoo
from tests.zoo.training.tiny import tiny
from zoo.signals import StoppedError
from zoo.training.loop import train
from zoo.training.lora import LoRA, adapted, add_adapters, merge_adapters, merged_tensors, write_adapter
from zoo.training.trained import find

SETTINGS = LoRA(rank=2, alpha=6)
SIZE = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 32}
IDS = torch.randint(32, (2, 24), generator=torch.Generator().manual_seed(0))


def with_adapters(lora=SETTINGS, **fields):
    """A model whose adapters have an effect."""
    model = zoo.create("gdn4-sleep2-hard16", **{**SIZE, **fields}, seed=3)
    add_adapters(model, lora)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_an_adapter_for_inserted_blocks_is_refused(tmp_path):
    """Their weights are in neither the base nor the adapter, unless the base was saved with them."""
    zoo.save(zoo.create("gdn4-sleep2-hard6", layers="gdn", d_model=16, d_ff=16, vocab_size=8), tmp_path / "base")
    about = {"model": str(tmp_path / "base"), "overrides": {"layers": "gdn attn"}}
    with pytest.raises(zoo.ZooError, match=r"^lora\.output: adapter: .* cannot hold the inserted blocks \(attn\); want output: merged$"):
        train(tiny(**about, lora={"output": "adapter"}), tmp_path / "run")
    train(tiny(**about, lora={}), tmp_path / "merged")
    train(tiny(model=str(tmp_path / "merged"), overrides={}, lora={"output": "adapter"}), tmp_path / "adapter")


@torch.no_grad()
def logits(model):
    return model(IDS[:, 16:], model.consolidate(IDS[:, :16])).logits


def test_an_adapter_adds_a_product_of_low_rank_and_is_zero_before_training():
    plain, model = (zoo.create("gdn4-sleep2-hard16", **SIZE, seed=3) for _ in range(2))
    add_adapters(model, SETTINGS)
    assert torch.equal(logits(model), logits(plain))
    layer = with_adapters().blocks[1].mixer.q_proj
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), linear(x, layer.weight) + 3 * x @ layer.lora_A.T @ layer.lora_B.T)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapted(model) for part in ("lora_A", "lora_B")}
    assert set(adapted(model)) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("_proj")}


def test_merged_equals_unmerged(tmp_path):
    model = with_adapters(LoRA(rank=2, alpha=6, patterns=("blocks.*_proj", "head")), tie_embeddings=False).double()
    expected, base = logits(model), zoo.create("gdn4-sleep2-hard16", **SIZE, tie_embeddings=False, seed=3).double()
    assert (expected - logits(base)).abs().max() > 0.1
    with pytest.raises(zoo.ZooError, match="merge adapters first"):
        zoo.save(model, tmp_path / "unmerged")
    merge_adapters(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=0)
    assert not adapted(model.float())
    zoo.save(model, tmp_path / "merged")
    assert torch.equal(logits(zoo.load(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_after_every_step_and_resumed_is_bit_identical(tmp_path, dtype):
    """On the weights of another run. Only the adapted layers and what `train` names change, the former by a matrix of low rank."""
    train(tiny(dtype=dtype), tmp_path / "base")
    lora = {"rank": 2, "train": ["norm.weight"], "patterns": ["blocks.*.mixer.*_proj"]}
    config = tiny(model=str(tmp_path / "base"), overrides={"evict": "hard"}, steps=4, dtype=dtype, lr=0.05, lora=lora, weight_decay=0.1)
    expected = train(config, tmp_path / "whole")
    for _ in range(4):
        with pytest.raises(StoppedError):
            train(config, tmp_path / "cut", report=lambda metrics: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config, tmp_path / "cut") == expected
    base, whole, cut = (zoo.load(tmp_path / name).state_dict() for name in ("base", "whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    metrics = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    changed = {name for name in base if not torch.equal(base[name], whole[name])}
    assert changed == {name for name in base if ".mixer." in name and name.endswith("_proj.weight")} | {"norm.weight"}
    if dtype == "float32":
        assert all(torch.linalg.matrix_rank(whole[n] - base[n], atol=1e-5) <= 2 for n in changed - {"norm.weight"})
    assert expected["loss"] == pytest.approx(train_loss(tmp_path / "whole"), abs=1e-5 if dtype == "float32" else 0.02)


def train_loss(folder):
    """Loss of a folder's model on the held-out sequences of its run."""
    from zoo.tasks import new_task
    from zoo.training.evaluate import evaluate

    found = find(folder)
    return evaluate(zoo.load(found.folder), new_task(found.run.task), found.run.eval_sequences)["loss"]


def test_adapters_for_other_weights_are_not_resumed(tmp_path):
    train(tiny(), tmp_path / "base")
    config = tiny(model=str(tmp_path / "base"), overrides={}, steps=4, lora={"rank": 2})
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", report=lambda metrics: os.kill(os.getpid(), signal.SIGTERM))
    train(tiny(steps=3), tmp_path / "base")
    with pytest.raises(zoo.ZooError, match=r"run: weights: changed since this run began; restore it"):
        train(config, tmp_path / "run")


def test_a_run_may_end_with_the_adapters_alone(tmp_path):
    results = train(tiny(steps=3, lora={"rank": 2, "output": "adapter"}), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapter", "checkpoints", "inputs.json", "metrics.jsonl", "results.json", "train.yaml"
    ]  # fmt: skip
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 16.0, "gdn4-sleep2-hard6")
    assert find(tmp_path / "run").step == 3  # the checkpoints hold them merged
    assert train_loss(tmp_path / "run") == pytest.approx(results["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"patterns": ["*.qq_proj"]}}, r"lora.patterns: '\*.qq_proj' matches no linear layer"),
        ({"lora": {"patterns": ["head"]}}, r"lora.patterns: 'head' matches no linear layer"),
        ({"lora": {"train": ["x"]}}, "lora.train: 'x' matches no parameter"),
        ({"lora": {"rank": 0}}, "lora.rank: 0"),
        ({"lora": {"train": ["norm.weight"], "output": "adapter"}}, "an adapter cannot hold these"),
        ({"lora": {}, "parallel": "fsdp"}, "fsdp does not shard adapters"),
        ({"lora": {}, "muon_lr": 0.1}, "adapters are trained by `optimizer`"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, changes, message):
    overrides = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "tie_embeddings": True}
    with pytest.raises(zoo.ZooError, match=message):
        train(tiny(overrides=overrides, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.extended
def test_a_merged_folder_exports_and_verifies(tmp_path):
    from zoo.export import export

    train(tiny(steps=3, lr=0.05, lora={"rank": 2}), tmp_path / "run")
    export(zoo.load(tmp_path / "run"), tmp_path / "bundle")  # compares the graphs with PyTorch


@pytest.mark.extended
def test_peft_reads_an_adapter_and_merges_the_same(tmp_path):
    import peft

    model = with_adapters()
    write_adapter(model, SETTINGS, tmp_path / "adapter", "gdn4")
    theirs = peft.PeftModel.from_pretrained(zoo.create("gdn4-sleep2-hard16", **SIZE, seed=3), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs.base_model.model), logits(model), atol=1e-6, rtol=0)
    ours, merged = merged_tensors(model), theirs.merge_and_unload().state_dict()
    assert all(torch.allclose(ours[name], merged[name], atol=1e-6) for name in ours)


def check_it_learns(model, ids):
    """Twelve steps of the parameters that need gradients, over which the loss of ids [B, T] falls."""
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    losses = []
    for _ in range(12):
        loss = model.loss(ids, mask)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_train_and_run_in_a_pool(kind):
    """The loss falls, the weights stay as they are, and a pool gives the tokens of a session."""
    model = zoo.create("gdn4-sleep2-hard16", **{**SIZE, "d_model": 64, "d_ff": 64}, sleep_on="every", seed=3)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.blocks, Int8WeightOnlyConfig())
    else:
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, layer in list(model.blocks.named_modules()):
            if isinstance(layer, nn.Linear):
                narrow = Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4")
                narrow.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                parent, _, leaf = name.rpartition(".")
                setattr(model.blocks.get_submodule(parent), leaf, narrow.to("cpu"))
    add_adapters(model, SETTINGS)
    check_it_learns(model, IDS)
    with pytest.raises(zoo.ZooError, match="quantised, so no adapter can be merged"):
        merge_adapters(model)
    alone = [int(t) for t in zoo.Session(model).generate(IDS[:1], 24, temperature=0)]
    pool = zoo.SessionPool(model, 2)
    assert [int(t) for t in pool.open().generate(IDS[:1], 24, temperature=0)] == alone

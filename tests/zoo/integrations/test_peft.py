"""LoRA of peft on a model. Needs `pip install '.[integrations]'`."""

import pytest
import torch

import zoo
from tests.zoo.training.test_lora import check_it_learns
from zoo.training.lora import LoRA, adapted, add_adapters

pytestmark = pytest.mark.extended

BLOCKS = {
    **{kind: {"heads": 2} for kind in ("attn", "gdn", "jet")},
    "mamba": {"state_dim": 8},
    "mamba2": {"head_dim": 8, "state_dim": 8},
}
FIELDS = {"name": "small", "vocab_size": 32, "d_model": 16, "d_ff": 16, "layers": " ".join(BLOCKS), "blocks": BLOCKS}
IDS = torch.randint(32, (2, 24), generator=torch.Generator().manual_seed(0))


def small():
    return zoo.create({**FIELDS, "evict": "hard", "window": 8, "loops": 2, "sleep_on": "every"}, seed=3)


@torch.no_grad()
def logits(model):
    return model(IDS[:, 16:], model.consolidate(IDS[:, 8:16], model.consolidate(IDS[:, :8]))).logits


def test_the_default_layers_are_those_of_our_own_adapters():
    import peft

    import zoo.integrations.peft  # noqa: F401  (registers the default layers)
    from zoo.integrations.transformers import SleepZooForCausalLM

    ours = small()
    add_adapters(ours, LoRA())
    assert set(peft.get_peft_model(small(), peft.LoraConfig()).targeted_module_names) == set(adapted(ours))
    wrapped = peft.get_peft_model(SleepZooForCausalLM.from_zoo(small()), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert {name[name.index("blocks.") :] for name in wrapped.targeted_module_names} == set(adapted(ours))


def test_adapters_train_through_sleeps_are_saved_loaded_and_merged(tmp_path):
    import peft

    import zoo.integrations.peft

    model = peft.get_peft_model(small(), peft.LoraConfig(r=2, lora_alpha=6))
    check_it_learns(model, IDS)
    expected = logits(model.get_base_model())
    assert (expected - logits(small())).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(small(), tmp_path / "adapter")
    assert torch.equal(logits(loaded.get_base_model()), expected)
    session = zoo.Session(loaded.get_base_model())
    zoo.save(loaded.merge_and_unload(), tmp_path / "merged")
    merged = zoo.load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(zoo.Session(merged).feed(IDS[:1]), session.feed(IDS[:1]), atol=1e-5, rtol=0)

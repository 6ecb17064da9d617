"""Time of a mixture of experts, compared with the implementations of transformers on the same weights. One thread, without a shared expert.

python -m benchmarks.experts
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import torch
import transformers
from torch import Tensor, nn

import zoo
from benchmarks.measure import compare, record
from zoo.blocks.moe import MoE, MoEOptions

EXPERTS, TOP, WIDTH, HIDDEN = 64, 6, 512, 256
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
DEFAULT = 1.5  # target beside the implementation that transformers chooses
FASTEST = 1.0  # target beside each implementation, and so beside the fastest


def theirs(implementation: str | None) -> nn.Module:
    """Return an OLMoE block with random weights; None: with the implementation that transformers chooses."""
    config = transformers.OlmoeConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        norm_topk_prob=True,
        num_hidden_layers=1,
        vocab_size=8,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, experts_implementation=implementation).eval()
    return model.layers[0].mlp


def ours(block: Any) -> MoE:
    """Return our block with the weights of theirs."""
    made = MoE(WIDTH, HIDDEN, MoEOptions(experts=EXPERTS, top_k=TOP)).eval()
    experts = block.experts
    tensors = {"router.proj.weight": block.gate.weight, "experts.up": experts.gate_up_proj, "experts.down": experts.down_proj}
    made.load_state_dict(tensors)
    return made


def run(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


@click.command()
@torch.no_grad()
def main() -> None:
    rows = []
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(zoo.matmul_precision())
    default = theirs(None)
    model = ours(default)
    others: dict[str, nn.Module] = {name: theirs(name) for name in IMPLEMENTATIONS}
    for tokens in (64, 1):
        x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0))
        mine = {"ours": partial(run, model, x)}
        case = f"{EXPERTS} experts, top {TOP}, {WIDTH} x {HIDDEN}, {tokens} token{'s' * (tokens > 1)}"
        each = {name: partial(run, block, x) for name, block in others.items()}
        rows.append(compare(case, mine | each, rounds=21, target=FASTEST, tolerance=1e-5))
        if tokens > 1:
            chosen = {"transformers": partial(run, default, x)}
            rows.append(compare(f"{case}, default", mine | chosen, rounds=21, target=DEFAULT, tolerance=1e-5))
    record("experts", rows)


if __name__ == "__main__":
    main()

"""A new mixer in one file: register it, name it in a layer pattern, and train a model that sleeps with it."""

from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.blocks.mixer import Mixer, mixers


@mixers.register("average")
class Average(Mixer):
    """Exponential moving average of the tokens. Fast weights: the average, [B, D]."""

    def __init__(self, d_model: int, options: Any, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def new_fast(self, batch: int) -> Tensor:
        return self.zeros(batch, self.o_proj.in_features, fast=True)

    def forward(self, x: Tensor, fast: Tensor, window: Any, positions: Any) -> tuple[Tensor, Tensor, Any]:
        averages = []
        for token in x.to(fast.dtype).unbind(dim=1):
            fast = 0.9 * fast + 0.1 * token
            averages.append(fast)
        return self.o_proj(torch.stack(averages, dim=1).to(x.dtype)), fast, window


model = zoo.create("gdn4-sleep2-hard4", layers="attn average", d_model=32, vocab_size=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    ids = torch.randint(4, (64, 6))
    ids[:, 5] = ids[:, 0]  # after a sleep on four tokens: which was the first?
    loss = model.loss(ids, torch.arange(6).expand(64, 6) == 5)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss after 60 steps: {loss.item():.3f}")

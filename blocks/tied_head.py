"""The head of a model whose embedding and head share one matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.blocks.linear import linear


class TiedHead(nn.Module):
    """Project hidden states [..., D] to logits [..., V] with the embedding of `model`. Has no parameter of its own."""

    _model: Any
    bias = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_model"] = model  # not registered as a submodule: it contains this one

    @property
    def weight(self) -> Tensor:
        """Weight of the embedding, [V, D]."""
        weight: Tensor = self._model.embed.weight
        return weight

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, h: Tensor) -> Tensor:
        return linear(h, self.weight)

"""CUDA graphs of steps without arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FORM = "CUDA graph" if torch.cuda.is_available() else "plain call"


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that replays `step` as a CUDA graph and returns the same memory each time; without a GPU, `step` itself."""
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile kernels and set up libraries before capturing
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay

"""The stages in order of worth, with their time limits."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """One stage: the module of its name has `TOOLS` and `cases`."""

    seconds: int
    """Time limit on a GPU, with the start of the process."""
    about: str


STAGES = {
    "denominators": Stage(25, "memory bandwidth, matrix products of each dtype, latency of a launch"),
    "kernels": Stage(90, "every Triton kernel and configuration against the float64 recurrence"),
    "decode": Stage(90, "a token in eager mode and as a CUDA graph, beside transformers"),
    "sleep": Stage(90, "a sleep of N = 4 passes in eager mode and as a CUDA graph"),
    "operators": Stage(90, "operators beside fla and mamba_ssm"),
    "prefill": Stage(60, "reading a prompt, beside transformers"),
    "training": Stage(75, "a training step in bfloat16"),
    "tensorrt": Stage(45, "a TensorRT engine: build, load, run, compare"),
    "figure2a": Stage(60, "figure 2a of the paper, a point for each t"),
}
"""The first six fit a command of 8 minutes, the others one of 3."""

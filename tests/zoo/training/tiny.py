"""The smallest run that trains a model that sleeps: a fraction of a second."""

import os
import signal

import pytest
import torch

import zoo
from zoo.config import validate
from zoo.signals import StoppedError
from zoo.training.config import TrainConfig
from zoo.training.loop import train

TINY = {
    "model": "gdn4-sleep2-hard6",
    "overrides": {"layers": "attn gdn", "d_model": 16, "d_ff": 16},
    "task": {"name": "cycle", "nodes": 6, "hops": 1},
    "steps": 2,
    "batch_size": 4,
    "log_every": 1,
    "eval_sequences": 4,
}


def tiny(**changes):
    return validate(TrainConfig, {**TINY, **changes}, "test")


def check_resumes(config, folder, stops, before=lambda: None):
    """Assert that a run that is stopped after each of its first steps ends bit-identical to an uninterrupted one.

    Args:
        before: called before each part of the run.
    """
    expected = train(config, folder / "whole")
    for _ in range(stops):
        before()
        with pytest.raises(StoppedError):
            train(config, folder / "cut", report=lambda metrics: os.kill(os.getpid(), signal.SIGTERM))
    before()
    results = train(config, folder / "cut")
    weights = [zoo.load(folder / name).state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert results == expected

"""The smallest run that trains a model that sleeps: a fraction of a second."""

from zoo.config import validate
from zoo.training.config import TrainConfig

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

"""Training of models that sleep: `train(TrainConfig(...), folder)` runs what `zoo train` runs."""

from zoo.training.config import TrainConfig as TrainConfig
from zoo.training.loop import train as train

"""Train a small model on a task, export it to ONNX, and run the graphs without PyTorch's modules."""

import tempfile
from pathlib import Path

import torch

import zoo
from zoo.tasks import new_task
from zoo.training import train
from zoo.training.config import read_config

STEPS = 30  # the shipped run takes 1,400, about two minutes, and answers nearly every question

with tempfile.TemporaryDirectory() as folder:
    run, bundle = Path(folder, "run"), Path(folder, "bundle")

    # `zoo train cycle steps=30`: a YAML file with some fields replaced. The run's folder is a model, and can be resumed.
    config = read_config("cycle", {"steps": STEPS, "batch_size": 32, "log_every": 10, "eval_sequences": 64})
    results = train(config, run, report=lambda line: print(f"step {line['step']}: loss {line['loss']:.3f}"))
    print(f"right answers: {results['accuracy']:.0%}, best guess {results['chance']:.0%}")

    # `zoo-export run --out bundle`: one graph for a token, one for a whole sleep, and the weights that both share.
    parity = zoo.export.export(zoo.load(run), bundle)
    print("files:", sorted(file.name for file in bundle.iterdir()))

    # The session on onnxruntime has the same methods, and sleeps with the exported graph.
    question = torch.from_numpy(new_task(config.task).batch(seed=1, step=0, size=1, split="test").ids[:, :14])
    for name, session in {"PyTorch": zoo.Session(zoo.load(run)), "onnxruntime": zoo.export.load(bundle)}.items():
        print(name, "answers", [int(token) for token in session.generate(question, tokens=1)])

"""Other operating systems: import, inference and training where modules of Unix and Linux are missing."""

import subprocess
import sys

PROGRAM = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
import torch
import zoo
from zoo.training.config import TrainConfig
from zoo.training.loop import train

folder = sys.argv[1]
model = zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=16, d_ff=16, vocab_size=256)
prompt = torch.arange(20)[None]
tokens = torch.cat(list(zoo.Session(model).generate(prompt, 3)))
zoo.save(model, folder + "/model")
loaded = zoo.load(folder + "/model")
session = zoo.Session(loaded)
assert torch.equal(tokens, torch.cat(list(session.generate(prompt, 3))))
session.save(folder + "/stream")
assert zoo.Session(loaded).load(folder + "/stream").stats().tokens == 22
with zoo.SessionPool(model, 2) as pool:
    assert torch.equal(tokens, torch.cat(list(pool.open().generate(prompt, 3))))
config = TrainConfig(
    model="gdn4-sleep2", overrides=dict(layers="attn gdn", d_model=16, d_ff=16, window=5),
    task=dict(name="cycle", nodes=5, hops=2), steps=2, batch_size=4, eval_sequences=8,
)
lines = []
train(config, folder + "/run", report=lines.append)
assert lines[-1]["step"] == 2 and "memory" not in lines[-1], lines
import zoo.training.ablation, zoo.training.workers, zoo.system, zoo.cli, zoo.serving.app, zoo.export.runtime
assert zoo.system.cores() == os.cpu_count()
"""


def test_without_the_modules_of_unix(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

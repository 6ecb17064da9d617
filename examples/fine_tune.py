"""Teach a trained hybrid to sleep: take the weights of a model that never slept, and fine-tune with N = 4 in a loop of your own."""

import tempfile
from pathlib import Path

import torch

import zoo
from zoo.tasks import new_task

task = new_task({"name": "passkey", "width": 16, "windows": 2, "pairs": 2, "keys": 8, "values": 8, "noise": 8})
fields = {"layers": "attn gdn", "d_model": 64, "vocab_size": task.vocab_size}

with tempfile.TemporaryDirectory() as folder:
    pretrained = Path(folder, "pretrained")  # stands for a run's folder, or one of a released model such as Jet-Nemotron's
    zoo.save(zoo.create("gdn4", seed=1, **fields), pretrained)
    model = zoo.create(f"gdn4-sleep4-hard{task.window}", pretrained=pretrained, **fields)

# Embedding and head stay as they are; what writes to the fast weights learns faster than the rest.
model.embed.requires_grad_(False)
model.head.requires_grad_(False)
recurrent = [p for block, kind in zip(model.blocks, model.config.pattern, strict=True) if kind == "gdn" for p in block.parameters()]
others = [p for block, kind in zip(model.blocks, model.config.pattern, strict=True) if kind != "gdn" for p in block.parameters()]
optimizer = torch.optim.AdamW([{"params": recurrent, "lr": 3e-3}, {"params": others, "lr": 3e-4}], weight_decay=0.0)

for step in range(21):
    batch = task.batch(seed=0, step=step, size=16)
    loss = model.loss(torch.from_numpy(batch.ids), torch.from_numpy(batch.loss_mask))  # sleeps between the windows
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

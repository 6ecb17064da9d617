"""A model reads a stream, sleeps whenever its window is full, and continues from what it has written into its fast weights."""

import torch

import zoo

model = zoo.create("gdn4-sleep4-hard24", vocab_size=64)  # fresh weights: this shows the mechanics, not good answers
stream = torch.randint(64, (1, 60), generator=torch.Generator().manual_seed(0))  # [B, T]: two windows of 24 tokens, and half of one

# By hand: sleep on each whole window, then read the rest in one ordinary pass.
with torch.no_grad():
    state = None
    for window in stream[:, :48].split(24, dim=1):
        state = model.consolidate(window, state)  # 4 passes; then the window cache is evicted
    by_hand = model(stream[:, 48:], state)
print("fast weights per layer:", [None if fast is None else list(fast.shape) for fast in state.fast])

# A session does the same by itself: it sleeps when its window is full and another token comes.
session = zoo.Session(model)
logits = session.feed(stream)  # [1, 60, 64]
assert torch.allclose(logits[:, 48:], by_hand.logits, atol=1e-5)
print("slept", session.stats().sleeps, "times; tokens in the window:", session.stats().window)

# A fork costs nothing until it reads: here the one sleeps longer than the other before both continue the stream.
deeper = session.fork()
session.sleep()
deeper.sleep(loops=16)
question = torch.tensor([[1, 2, 3]])
for name, each in {"N = 4 ": session, "N = 16": deeper}.items():
    print(name, [int(token) for token in each.generate(question, tokens=8, stop=(0,))])

"""Many conversations with one model: their tokens are decoded in one batch, and their sleeps fill the gaps."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch

import zoo

STREAMS = 6


def converse(number: int) -> list[int]:
    """Take three turns on a stream of its own; the stream remembers the earlier ones in its fast weights."""
    random = torch.Generator().manual_seed(number)
    said = []
    with closing(pool.open()) as stream:
        for _ in range(3):
            prompt = torch.randint(64, (1, 10), generator=random)
            said += [int(token) for token in stream.generate(prompt, tokens=8, temperature=0.8, seed=number)]
    return said


model = zoo.create("gdn4-sleep4-hard24", vocab_size=64)

# Four streams share a batch, six may be open. Each sleeps after 16 tokens, in the background, and keeps reading meanwhile.
with zoo.SessionPool(model, slots=4, streams=STREAMS, when="interval(16)") as pool:
    print(f"the states of {STREAMS} streams take at most {pool.bytes:,} bytes, however long they get")
    with ThreadPoolExecutor(STREAMS) as threads:  # one thread per stream; the pool runs the model in a thread of its own
        for number, said in enumerate(threads.map(converse, range(STREAMS))):
            print(f"stream {number}: {said}")
    print("sleeps:", pool.sleeps)

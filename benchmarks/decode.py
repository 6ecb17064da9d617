"""Cost of a predicted token: sessions compared with transformers and llama.cpp on the same weights, and with the lower bound.

    python -m benchmarks.decode [--all]

"limit" reads as many bytes as the weights have, once. As in `zoo chat`, our weights are laid out by `zoo.arrange_weights`; all
contenders run under the precision that `zoo.matmul_precision` finds.
Exported bundles are of the ort dialect; llama.cpp has the same weights as F32, Q8_0 and Q4_0. "compiled" is a pool with compile=True.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import zoo
from benchmarks import stored
from benchmarks.gguf_files import takes
from benchmarks.gpu.models import greedy
from benchmarks.llama import Llama
from benchmarks.measure import LIMIT, compare, record
from benchmarks.peers import WORDS, pairs
from zoo.export.runtime import ExportedModel
from zoo.sessions.compiled import compiled_blocks
from zoo.system import release_threads

PROMPT, TOKENS, LENGTH = 128, 16, 1024
TARGETS = {"Mamba-2 50M": {"F32": 1.25, "Q8_0": 1.6, "Q4_0": 1.8}, "attention 50M": {"F32": 1.3, "Q8_0": 1.05, "Q4_0": 1.5}}
"""Intended time of an exported graph at batch 1, divided by that of llama.cpp."""
COMPILED = {("Mamba-2 50M", 1): 1.6, ("Mamba-2 50M", 16): 1.0, ("attention 50M", 16): 1.0}
"""Intended time of a compiled token, divided by that of llama.cpp in F32."""


def ours(model: Any, prompt: Tensor, tokens: int = TOKENS) -> Callable[[], Tensor]:
    """Return a function that generates the next greedy tokens, [B, `tokens`], of the stream after `prompt`."""
    if isinstance(model, zoo.Model):
        zoo.arrange_weights(model)
    session = zoo.Session(model, len(prompt))
    session.feed(prompt)
    return lambda: torch.stack(list(session.generate(None, tokens)), dim=1)


def compiled(model: zoo.Model, prompt: Tensor, tokens: int = TOKENS) -> Callable[[], Tensor]:
    """Return the same for a pool whose blocks are compiled."""
    zoo.arrange_weights(model, compile=True)
    pool = zoo.SessionPool(model, len(prompt), context=LENGTH, compile=True)
    streams, threads, blocks = [pool.open() for _ in prompt], ThreadPoolExecutor(len(prompt)), compiled_blocks(model)

    def generate() -> Tensor:
        return torch.stack(list(threads.map(lambda stream: torch.cat(list(stream.generate(None, tokens))), streams)))

    for stream, ids in zip(streams, prompt, strict=True):
        stream.read(ids[None])
    for _ in range(3):
        generate()
        blocks.wait()  # those for batches that were not full, too
    return generate


def llama(model: Llama | None, prompt: Tensor, tokens: int = TOKENS) -> Callable[[], Tensor] | None:
    """Return the same for llama.cpp; None where it is not installed."""
    if model is None:
        return None
    logits = torch.from_numpy(model.read(prompt))

    def generate() -> Tensor:
        nonlocal logits
        generated = []
        for _ in range(tokens):
            generated.append(logits.argmax(-1))
            logits = torch.from_numpy(model.read(generated[-1][:, None]))
        release_threads()  # which are those of torch: a pool computes in another thread than this
        return torch.stack(generated, dim=1)

    return generate


def reading(size: int) -> Callable[[], object]:
    """Return a function that reads `size` bytes from memory for every token."""
    values = torch.ones(size // 4)

    def read() -> None:
        for _ in range(TOKENS):
            values.sum()
        release_threads()

    return read


@click.command()
@click.option("--all", "large", is_flag=True, help="Include the models of 370M and more.")
@torch.no_grad()
def main(large: bool) -> None:
    rows = []
    torch.set_float32_matmul_precision(zoo.matmul_precision())
    for name, model, theirs in pairs(large):
        with tempfile.TemporaryDirectory() as scratch:
            folder, forms = Path(scratch), list(stored.FORMS) if takes(model) and name.endswith("50M") else []
            if forms:
                stored.write(model, folder, forms, LENGTH)
            whole = sum(4 * p.numel() for p in model.parameters())
            for threads, batch in ((1, 1), (2, 1), (2, 16)):
                torch.set_num_threads(threads)
                prompt = torch.randint(WORDS, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
                case = f"{name}, batch {batch}" + ", 1 thread" * (threads == 1)
                contenders = {"ours": ours(model, prompt), "transformers": greedy(theirs, prompt, TOKENS)}
                if forms:
                    contenders["llama.cpp"] = llama(stored.in_llama(folder, "F32", batch, LENGTH), prompt)
                contenders[LIMIT] = reading(whole)
                rows.append(compare(case, contenders, rounds=5, per=TOKENS, target=2))
                if threads == 2:
                    peers = {name: work for name, work in contenders.items() if name in ("llama.cpp", LIMIT)}
                    contenders = {"ours": compiled(model, prompt)} | peers
                    target = 1 / COMPILED[name, batch] if (name, batch) in COMPILED else None
                    rows.append(compare(f"{case}, compiled", contenders, rounds=5, per=TOKENS, target=target))
                for form in forms:
                    peer = stored.in_llama(folder, form, batch, LENGTH)
                    contenders = {"ours": ours(ExportedModel(folder / form), prompt), "llama.cpp": llama(peer, prompt)}
                    contenders[LIMIT] = reading((folder / form / "weights.bin").stat().st_size)
                    target = 1 / TARGETS[name][form] if name in TARGETS and batch == 1 else None
                    rows.append(compare(f"{case}, exported, {form}", contenders, rounds=5, per=TOKENS, target=target))
    record("decode", rows)


if __name__ == "__main__":
    main()

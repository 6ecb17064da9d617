"""Time to the first token of a prompt whose beginning has been read before.

    python -m benchmarks.server_prefix

A server answers two users with the same system prompt of 3,000 tokens, and the second one asks for another answer. "first user" is
the time without a cached state. llama.cpp runs in this process, on the same weights: it keeps the attention cache of the system
prompt, or, for Mamba-2, saves its state after the system prompt and after the question.
"""

from __future__ import annotations

import random
import string
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from benchmarks.gguf_files import write_gguf
from benchmarks.llama import INSTALLED, Llama
from benchmarks.measure import quartiles, record
from benchmarks.serving import Server, serving

SYSTEM, ROUNDS = 3000, 5
TARGETS = {"second user": 10, "regenerated": 20}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba-2 34M": ("mamba2-130m", {"layers": "mamba2*20"}),
    "attention 32M": ("gdn4", {"layers": "attn*10", "d_ff": 1536, "evict": "none", "blocks": {"attn": {"heads": 8, "kv_heads": 4}}}),
}
FIELDS = {"vocab_size": 256, "d_model": 512, "tie_embeddings": True}


def words(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_letters, k=count))


def ours(server: Server, system: str, question: str) -> float:
    """Return the seconds until the first token."""
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    started = time.perf_counter()
    stream = server.client().chat.completions.create(model="model", messages=messages, stream=True, max_tokens=1, temperature=0)
    next(part for part in stream if part.choices and part.choices[0].delta.content is not None)
    return time.perf_counter() - started


def theirs(llama: Llama, system: Tensor, questions: list[Tensor], *, cuts: bool) -> dict[str, float]:
    """Return the seconds of llama.cpp until the logits of the first token, for each of `TARGETS` and for the first user."""
    llama.clear()
    first = _timed(lambda: (llama.read(system), llama.read(questions[0])))
    llama.clear()
    llama.read(system)
    kept, position = llama.save(), llama.position
    if cuts:
        llama.read(questions[0])
        second = _timed(lambda: (llama.cut(position), llama.read(questions[1])))
        again = _timed(lambda: (llama.cut(llama.position - 1), llama.read(questions[1][:, -1:])))
    else:
        second = _timed(lambda: (llama.restore(kept, position), llama.read(questions[1][:, :-1])))
        kept, position = llama.save(), llama.position
        again = _timed(lambda: (llama.restore(kept, position), llama.read(questions[1][:, -1:])))
    return {"first user": first, "second user": second, "regenerated": again}


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    rows, rng = [], random.Random(0)
    for name, (base, fields) in MODELS.items():
        model, found = zoo.create(base, **FIELDS, **fields), defaultdict[tuple[str, str], list[float]](list)
        with tempfile.TemporaryDirectory() as folder:
            zoo.save(model, f"{folder}/model")
            with serving(f"{folder}/model") as server:
                ours(server, "warm", "up")
                for _ in range(ROUNDS):
                    system, asked = words(rng, SYSTEM), [words(rng, 20) for _ in range(2)]
                    for case, question in (("first user", asked[0]), ("second user", asked[1]), ("regenerated", asked[1])):
                        found["ours", case].append(ours(server, system, question))
            if INSTALLED:
                write_gguf(model, Path(folder) / "model.gguf")
                llama = Llama(Path(folder) / "model.gguf", threads=torch.get_num_threads())
                for _ in range(ROUNDS):
                    ids, *asked_ids = (torch.randint(256, (1, count)) for count in (SYSTEM, 20, 20))
                    for case, seconds in theirs(llama, ids, asked_ids, cuts="attention" in name).items():
                        found["llama.cpp", case].append(seconds)
                llama.close()
        for case in ("first user", *TARGETS):
            taken = found["ours", case]
            if case in TARGETS:
                rows.append(_row(f"{name}: {case}", taken, "first user", found["ours", "first user"]) | {"target": TARGETS[case]})
            rows.append(_row(f"{name}: {case}, beside llama.cpp", taken, "llama.cpp", found["llama.cpp", case]))
    record("server_prefix", rows)


def _row(case: str, ours: list[float], other: str, theirs: list[float]) -> dict[str, Any]:
    times = {"ours": quartiles(1e3 * np.array(ours))}
    if not theirs:
        return {"case": case, "unit": "ms", "times": times, "ratios": {}, "problems": {other: "not installed"}}
    times[other] = quartiles(1e3 * np.array(theirs))
    return {"case": case, "unit": "ms", "times": times, "ratios": {other: quartiles(np.array(theirs) / np.array(ours))}}


if __name__ == "__main__":
    main()

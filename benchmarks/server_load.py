"""Latency of the server under load: time to the first token and between tokens.

    python -m benchmarks.server_load [CLIENTS] [SECONDS]

Starts `zoo serve` on loopback with a small sleeping model. Every client keeps one session and sends greedy requests without a
pause. Afterwards every conversation is compared with that of a session in this process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import zoo
from benchmarks.measure import record
from benchmarks.serving import Answer, Server, ask, expected, latencies, serving

MODEL = {"model": "gdn4-sleep2-hard64", "d_model": 128, "vocab_size": 256}
TOKENS = 16


def talk(server: Server, seconds: float, client: int) -> list[Answer]:
    api, answers, until = server.client(), list[Answer](), time.perf_counter() + seconds
    while time.perf_counter() < until:
        answers.append(ask(api, f"{client} says {len(answers)}", TOKENS, f"client-{client}"))
    return answers


def main(clients: int = 32, seconds: float = 60.0) -> None:
    model = zoo.create(**MODEL)
    with tempfile.TemporaryDirectory() as folder:
        zoo.save(model, f"{folder}/model")
        with serving(f"{folder}/model", "--slots", str(clients)) as server, ThreadPoolExecutor(clients) as threads:
            results = list(threads.map(partial(talk, server, seconds), range(clients)))
    lost = 0
    for client, answers in enumerate(results):
        prompts = [f"{client} says {n}" for n in range(len(answers))]
        lost += [answer.text for answer in answers] != expected(model, prompts, TOKENS)
    every = [answer for answers in results for answer in answers]
    rows = latencies(f"{clients} clients for {seconds:.0f} s", every, lost=lost, model=MODEL)
    record("server_load", rows)
    assert not lost


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, float), sys.argv[1:], strict=False)))

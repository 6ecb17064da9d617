"""Cost of sleeps on a server: to the tokens of other streams, and to the next token of their own.

    python -m benchmarks.server_sleep [CLIENTS] [SECONDS]

Every client keeps one session. The runs with N = 1 and with N = 4 alternate. Under `idle(0.5)` clients pause between requests, for
up to 1.2 s: a pause is short, or ends during a sleep, which the request cancels, or after it.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

import zoo
from benchmarks.measure import quartiles, record
from benchmarks.serving import Server, ask, percentiles, serving

MODEL = {"model": "gdn4-hard64", "d_model": 128, "vocab_size": 256}
WINDOW, PROMPT, TOKENS, PAUSE, LONGEST_PAUSE = 64, 8, 24, 0.5, 1.2
ROUNDS = 2
Waits = dict[str, list[float]]


def talk(server: Server, seconds: float, pauses: bool, client: int) -> Waits:
    """Return the seconds that a client waits for tokens, by what happened before the token."""
    api, rng, found = server.client(), random.Random(client), defaultdict[str, list[float]](list)
    until, held, pause = time.perf_counter() + seconds, 0, 0.0
    while time.perf_counter() < until:
        waits = ask(api, f"{client:08d}", TOKENS, f"client-{client}").waits
        with urllib.request.urlopen(f"{server.url}/v1/sessions/client-{client}", timeout=60) as response:
            window = json.load(response)["window"]["tokens"]
        # every token of an answer but the last has been read, and the first of them after the prompt and the last token before it
        at_first = window - (len(waits) - 1)
        found["between tokens"] += [wait for n, wait in enumerate(waits) if n and at_first + n != 1]
        if held:
            if at_first == PROMPT + 1 and held < WINDOW:
                before = "a sleep in the pause"
            elif at_first <= PROMPT + 1:
                before = "a full window"
            else:
                before = "a cancelled sleep" if pauses and pause > PAUSE else "no sleep"
            found[f"first token after {before}"].append(waits[0])
        held = window
        if pauses:
            time.sleep(pause := rng.uniform(0, LONGEST_PAUSE))
    return found


def run(loops: int, when: str, clients: int, seconds: float) -> Waits:
    model, found = zoo.create(**MODEL, loops=loops), defaultdict[str, list[float]](list)
    with torch.no_grad():
        model.head.weight[128:] = 0  # no token is a part of a character
    with tempfile.TemporaryDirectory() as folder:
        zoo.save(model, f"{folder}/model")
        options = "--slots", str(clients), "--when", when
        with serving(f"{folder}/model", *options) as server, ThreadPoolExecutor(clients) as threads:
            for waits in threads.map(partial(talk, server, seconds, when != "full"), range(clients)):
                for name, values in waits.items():
                    found[name] += values
    return found


def compared(case: str, found: dict[int, Waits]) -> list[dict[str, Any]]:
    """Return the rows of one schedule: the waits with N = 4 compared with those with N = 1."""
    rows = []
    for name in sorted({name for waits in found.values() for name in waits}):
        figures = {f"N = {loops}": percentiles(waits[name]) for loops, waits in found.items() if waits.get(name)}
        for which in ("median", "p99"):
            times = {loops: figure[which] for loops, figure in figures.items()}
            row = {"case": f"{case}: {name}, {which}", "unit": "ms", "ours": "N = 1", "times": times, "ratios": {}, "model": MODEL}
            row["problems"] = {loops: "did not occur" for loops in ("N = 1", "N = 4") if loops not in times}
            if not row["problems"]:
                row["ratios"] = {"N = 4": quartiles([times["N = 4"][1] / times["N = 1"][1]])}
            row["count"] = {loops: len(waits.get(name, [])) for loops, waits in found.items()}
            rows.append(row | ({"target": 1.5} if (name, which) == ("between tokens", "p99") else {}))
    return rows


def main(clients: int = 16, seconds: float = 30.0) -> None:
    rows = []
    for when in ("full", f"idle({PAUSE})"):
        found: dict[int, Waits] = {loops: defaultdict(list) for loops in (1, 4)}
        for _ in range(ROUNDS):
            for loops, waits in found.items():
                for name, values in run(loops, when, clients, seconds).items():
                    waits[name] += values
        rows += compared(f"{clients} clients, {when}", found)
    record("server_sleep", rows)


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, float), sys.argv[1:], strict=False)))

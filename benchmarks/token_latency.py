"""Latency of tokens with and without concurrent sleeps, in alternation within one run.

    python -m benchmarks.token_latency [session|pool] ...

session: one stream; the next token while a sleep runs in the background, and without one.
pool: eight streams of a 50M model that generate while others sleep, and without sleeps. Ratios are relative to the median without
sleeps in the same round.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import zoo
from benchmarks.measure import quartiles, record

MODEL: dict[str, Any] = {"model": "depo10-sleep4", "d_model": 576, "blocks": {"attn": {"heads": 9}, "jet": {"heads": 9}}, "window": 256}
SLEPT_ON = 75  # tokens, as in the paper
ROUNDS = 4

Waits = dict[str, list[float]]
"""Seconds per token by condition, the one without sleeps first."""


def row(case: str, rounds: list[Waits], target: float | None = None, **more: Any) -> dict[str, Any]:
    figures = {f"{kind}, p{q}": [1e3 * np.percentile(waits[kind], q) for waits in rounds] for kind in rounds[0] for q in (50, 99)}
    ours = next(iter(figures))
    times = {name: quartiles(values) for name, values in figures.items()}
    ratios = {name: quartiles(np.array(values) / np.array(figures[ours])) for name, values in figures.items() if name != ours}
    tokens = {kind: sum(len(waits[kind]) for waits in rounds) for kind in rounds[0]}
    made = {"case": case, "unit": "ms", "rounds": len(rounds), "target": target, "ours": ours, "times": times, "ratios": ratios}
    return made | {"tokens": tokens, **more}


def session() -> dict[str, Any]:
    """Measure the next token during a background sleep, and without one."""
    model = zoo.create(**MODEL)
    prompt, rounds = torch.zeros(1, SLEPT_ON, dtype=torch.long), []
    for _ in range(ROUNDS):
        waits: Waits = {"awake": [], "beside a sleep": []}
        for kind, seconds in waits.items():
            stream = zoo.Session(model)
            stream.feed(prompt)
            if kind != "awake":
                stream.sleep(wait=False)
            for _ in range(40):
                if kind != "awake" and stream._stream.sleep is None:
                    break
                before = time.perf_counter()
                stream.feed(prompt[:, :1])
                seconds.append(time.perf_counter() - before)
            stream.close()
        rounds.append(waits)
    return row("one stream, 50M", rounds)


def pool(streams: int = 8, sleepers: int = 2) -> dict[str, Any]:
    """Measure eight streams that generate without a pause, alone and while other streams sleep without a pause."""
    model = zoo.create(**MODEL)
    window, rounds, sleeps, seconds = torch.zeros(1, SLEPT_ON, dtype=torch.long), [], 0, 0.0
    with zoo.SessionPool(model, streams, streams=streams + 2 * sleepers) as served, ThreadPoolExecutor(streams + sleepers) as threads:
        others = [served.open() for _ in range(sleepers)]
        for other in others:
            other.feed(window)
        for _ in range(ROUNDS):
            waits: Waits = {"without sleeps": [], "sleeps in the gaps": []}
            for kind, found in waits.items():
                done, started = threading.Event(), time.perf_counter()
                asleep = [threads.submit(_sleep_until, done, other) for other in others if kind == "sleeps in the gaps"]
                speakers = [served.open() for _ in range(streams)]
                for waited in threads.map(_speak, speakers):
                    found += waited
                done.set()
                if asleep:
                    sleeps += sum(each.result() for each in asleep)
                    seconds += time.perf_counter() - started
                for speaker in speakers:
                    speaker.close()
            rounds.append(waits)
        started = time.perf_counter()
        others[0].sleep()
        alone = time.perf_counter() - started
    return row("pool of 8 streams, 50M", rounds, 1.5, seconds_per_sleep={"in the gaps": seconds / sleeps, "alone": alone})


def _speak(stream: zoo.Session) -> list[float]:
    """Return the seconds between the tokens of an answer that fills the window, except near its ends, where other streams idle."""
    at = [time.perf_counter() for _ in stream.generate(torch.zeros(1, 8, dtype=torch.long), MODEL["window"] - 8)]
    return [after - before for before, after in itertools.pairwise(at)][5:-5]


def _sleep_until(done: threading.Event, stream: zoo.Session) -> int:
    """Sleep on the same tokens repeatedly; returns the number of sleeps."""
    for count in itertools.count():
        if done.is_set():
            return count
        twin = stream.fork()
        twin.sleep()
        twin.close()
    raise AssertionError


if __name__ == "__main__":
    record("token_latency", [{"session": session, "pool": pool}[kind]() for kind in sys.argv[1:] or ["session", "pool"]])

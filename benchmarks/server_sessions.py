"""Memory and latency of a server whose sessions do not fit into its memory.

    python -m benchmarks.server_sessions [SESSIONS] [CLIENTS]

Every session is visited twice, in random order, so that it moves out of memory and is read back from the store. The states of all
sessions together take at least four times the memory that the server may use for states. Afterwards 200 sessions are compared with
sessions in this process that were never interrupted.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zoo
from benchmarks.measure import quartiles, record
from benchmarks.serving import Answer, Server, ask, expected, latencies, serving

MODEL: dict[str, Any] = {  # small, with large states
    "model": "gdn4-sleep2-hard16",
    "layers": "attn gdn",
    "d_model": 64,
    "d_ff": 64,
    "vocab_size": 256,
    "blocks": {"gdn": {"heads": 4, "head_dim": 64, "expand_v": 4}},
}
TOKENS, SAMPLED = 6, 200
PREFIXES, STREAMS = 2**27, 3 * 2**27  # bytes for cached states and for those of streams: 512 MiB together
SLOTS = 16


class Visits:
    """Answers to the visits of all sessions, and the server's memory in the meantime."""

    def __init__(self, server: Server, order: list[int]) -> None:
        self.server, self.order, self.answers = server, order, dict[int, list[Answer]]()
        self.memory: list[tuple[int, int]] = []
        """Number of visits begun, and bytes."""
        self._lock, self._begun, self._busy, self._ended = threading.Lock(), 0, set[int](), threading.Event()

    def client(self, _: int) -> None:
        api = self.server.client()
        while (name := self._next()) is not None:
            visit = len(self.answers.setdefault(name, []))
            answer = ask(api, prompt(name, visit), TOKENS, f"session-{name}")
            self.answers[name].append(answer)
            with self._lock:
                self._busy.discard(name)

    def _next(self) -> int | None:
        """Return the next session that no other client is visiting."""
        with self._lock:
            for at, name in enumerate(self.order):
                if name not in self._busy:
                    self._busy.add(name)
                    self._begun += 1
                    return self.order.pop(at)
        return None

    def watch(self) -> None:
        while not self._ended.wait(0.25):
            self.memory.append((self._begun, self.server.memory))

    def make(self, clients: int) -> None:
        watcher = threading.Thread(target=self.watch)
        watcher.start()
        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(self.client, range(clients)))
        self._ended.set()
        watcher.join()


def prompt(session: int, visit: int) -> str:
    """Return a prompt that is longer than the window: a session that has slept keeps two states, and one that has not keeps one."""
    return f"session {session:5}, visit {visit}"


def main(sessions: int = 10_000, clients: int = 32) -> None:
    model, rng = zoo.create(**MODEL), random.Random(0)
    with zoo.SessionPool(model, SLOTS) as pool, zoo.SessionPool(model, SLOTS, streams=SLOTS + 1) as larger:
        streams = SLOTS + (STREAMS - pool.bytes) // (larger.bytes - pool.bytes)
        state = pool.open().stats().state_bytes
    order = [name for name in range(sessions) for _ in range(2)]
    rng.shuffle(order)
    with tempfile.TemporaryDirectory() as folder:
        zoo.save(model, f"{folder}/model")
        options = "--store", f"{folder}/store", "--slots", SLOTS, "--sessions", streams, "--max-bytes", STREAMS, "--prefix-bytes", PREFIXES
        with serving(f"{folder}/model", *map(str, options)) as server:
            before, visits = server.memory, Visits(server, order)
            visits.make(clients)
    first, second = (max(size for begun, size in visits.memory if (begun <= sessions) == half) for half in (True, False))
    for name in rng.sample(range(sessions), min(SAMPLED, sessions)):
        assert [answer.text for answer in visits.answers[name]] == expected(model, [prompt(name, 0), prompt(name, 1)], TOKENS), name
    case, facts = f"{sessions:,} sessions of {state // 1024} KiB", {"model": MODEL, "streams": streams, "clients": clients}
    rows = latencies(case, [answer for answers in visits.answers.values() for answer in answers], **facts)
    sizes = {"first half": first, "second half": second, "model and bound": before + STREAMS + PREFIXES}
    times = {name: [size / 2**20] * 3 for name, size in sizes.items()}
    ratios = {name: quartiles([size / first]) for name, size in sizes.items() if name != "first half"}
    row = {"case": f"peak memory, {case}", "unit": "MiB", "ours": "first half", "times": times, "ratios": ratios}
    rows.append(row | {"states": sessions * state, **facts})
    record("server_sessions", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Latency of the server under load: time to the first token and between tokens.

    python -m benchmarks.server_load [CLIENTS] [SECONDS]

Starts `zoo serve` on loopback with a small sleeping model. Every client keeps one session and sends greedy requests without a
pause. Afterwards every conversation is compared with that of a session in this process.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import openai
import torch

import zoo
from benchmarks.measure import quartiles, record
from zoo.text.tokenizers import ByteTokenizer

MODEL = {"model": "gdn4-sleep2-hard64", "d_model": 128, "vocab_size": 256}
TOKENS = 16


def talk(url: str, name: str, seconds: float, client: int) -> tuple[list[str], list[float], list[float]]:
    """Return the answers, the seconds to each first token, and the seconds between tokens."""
    api = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    answers, first, between, until = [], [], [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        prompt, answer, at = f"{client} says {len(answers)}", "", time.perf_counter()
        how = {"model": name, "temperature": 0, "max_tokens": TOKENS, "extra_body": {"session": f"client-{client}"}}
        for n, part in enumerate(api.completions.create(prompt=prompt, stream=True, **how)):
            now = time.perf_counter()
            (between if n else first).append(now - at)
            answer, at = answer + part.choices[0].text, now
        answers.append(answer)
    return answers, first, between


def expected(model: zoo.Model, client: int, count: int) -> list[str]:
    session, text, answers = zoo.Session(model), ByteTokenizer(256), []
    for n in range(count):
        prompt = torch.tensor([text.encode(f"{client} says {n}")])
        answers.append(text.decode(map(int, session.generate(prompt, TOKENS))))
    return answers


def main(clients: int = 32, seconds: float = 60.0) -> None:
    model = zoo.create(**MODEL)
    with tempfile.TemporaryDirectory() as folder:
        zoo.save(model, f"{folder}/model")
        command = [sys.executable, "-c", "from zoo.cli import main; main()", "serve", f"{folder}/model", "--port", "0"]
        server = subprocess.Popen([*command, "--slots", str(clients)], stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        url = next(match[0] for line in server.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+", line))) + "/v1"
        try:
            with ThreadPoolExecutor(clients) as threads:
                results = list(threads.map(partial(talk, url, model.config.name, seconds), range(clients)))
        finally:
            server.terminate()
            server.wait(30)
    lost = sum(answers != expected(model, client, len(answers)) for client, (answers, _, _) in enumerate(results))
    case, rows = f"{clients} clients for {seconds:.0f} s", []
    for label, which in (("first token", 1), ("between tokens", 2)):
        waits = 1e3 * np.concatenate([result[which] for result in results])
        times = {"median": quartiles(waits), "p99": [float(f"{np.percentile(waits, 99):.4g}")] * 3}
        ratios = {"p99": quartiles([times["p99"][1] / times["median"][1]])}
        counts = {"count": len(waits), "lost": lost}
        rows.append({"case": f"{label}, {case}", "unit": "ms", "times": times, "ratios": ratios, **counts, "model": MODEL})
    record("server_load", rows)
    assert not lost


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, float), sys.argv[1:], strict=False)))

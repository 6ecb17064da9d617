"""`zoo serve` in a process of its own, and what a client of it measures."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import torch

import zoo
from benchmarks.measure import quartiles
from zoo.text.tokenizers import ByteTokenizer


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    @property
    def memory(self) -> int:
        """Bytes of resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


@contextmanager
def serving(folder: str, *options: str) -> Iterator[Server]:
    """Serve the model in a folder on a free port until the context ends."""
    command = [sys.executable, "-m", "zoo", "serve", folder, "--name", "model", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next(match[0] for line in process.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
        yield Server(process, url)
    finally:
        process.terminate()
        process.wait(120)


class Answer(NamedTuple):
    text: str
    waits: list[float]
    """Seconds until the first token, and then between tokens."""


def ask(api: openai.OpenAI, prompt: Any, tokens: int, session: str | None = None) -> Answer:
    """Return the greedy completion of a prompt: a text or token ids, in a session or without one."""
    extra = {} if session is None else {"session": session}
    text, waits, at = "", [], time.perf_counter()
    for part in api.completions.create(model="model", prompt=prompt, stream=True, temperature=0, max_tokens=tokens, extra_body=extra):
        now = time.perf_counter()
        waits.append(now - at)
        text, at = text + part.choices[0].text, now
    return Answer(text, waits)


def expected(model: zoo.Model, prompts: list[str], tokens: int) -> list[str]:
    """Return the greedy answers to prompts in one session, without a server."""
    session, text = zoo.Session(model), ByteTokenizer(256)
    return [text.decode(map(int, session.generate(torch.tensor([text.encode(prompt)]), tokens))) for prompt in prompts]


def latencies(case: str, answers: list[Answer], **facts: Any) -> list[dict[str, Any]]:
    """Return a row for the first tokens of the answers, and one for the tokens after them."""
    rows = []
    for label, of in (("first token", slice(1)), ("between tokens", slice(1, None))):
        waits = [wait for answer in answers for wait in answer.waits[of]]
        times = percentiles(waits)
        ratios = {"p99": quartiles([times["p99"][1] / times["median"][1]])}
        row = {"case": f"{label}, {case}", "unit": "ms", "ours": "median", "times": times, "ratios": ratios}
        rows.append(row | {"count": len(waits), **facts})
    return rows


def percentiles(seconds: list[float]) -> dict[str, list[float]]:
    """Return the median with its quartiles, and the 99 % quantile, in milliseconds."""
    waits = 1e3 * np.array(seconds)
    return {"median": quartiles(waits), "p99": [float(f"{np.percentile(waits, 99):.4g}")] * 3}

"""Two replicas of the server behind Ray Serve (examples/ray_serve.py). Needs `pip install '.[integrations]'`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import zoo
from zoo.text.tokenizers import ByteTokenizer

pytestmark = pytest.mark.extended
EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_serve.py"
SESSIONS = [f"s{n}" for n in range(12)]


def replicas():
    """Return the process ids of the replicas, which Ray names so."""
    names = {int(file.parent.name): file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()}
    return [pid for pid, name in names.items() if name.startswith(b"ray::ServeReplica")]


def until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def leases(store):
    """Return a number for each session, which is one more after every change of its replica."""
    return {lease: int(lease.read_text()) for lease in store.rglob("lease")}


def test_sessions_outlive_their_replica(tmp_path):
    """Each session stays on one replica while there are the same ones, and continues with the same tokens after one is killed."""
    model = zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=16, d_ff=16, vocab_size=256)
    with torch.no_grad():
        model.head.weight.mul_(20)  # answers that depend on the conversation
    zoo.save(model, tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, store = f"http://127.0.0.1:{port}", tmp_path / "store"
    command = [sys.executable, EXAMPLE, tmp_path / "model", store, str(port)]
    said = defaultdict(list)

    def ask(turn):
        for name in SESSIONS:
            body = {"model": model_name, "prompt": f"{name} {turn} ", "max_tokens": 8, "temperature": 0}
            headers = {"content-type": "application/json", "x-session-id": name}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
            said[name].append(json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["text"])

    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as server:
        try:
            until(lambda: "hash ring for Deployment(name='Replica', app='default'): 2 replicas" in (tmp_path / "log").read_text())
            model_name = json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"]
            ask(0)
            first = leases(store)
            assert len(first) == len(SESSIONS)
            for turn in (1, 2):
                ask(turn)
            assert leases(store) == first
            gone = replicas()[0]
            os.kill(gone, signal.SIGKILL)
            ask(3)
            moved = sum(number - first[lease] for lease, number in leases(store).items())
            assert 0 < moved < len(SESSIONS)
            until(lambda: len(replicas()) == 2)
            ask(4)
            ask(5)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(120)
    tokenizer = ByteTokenizer(256)
    for name in SESSIONS:
        alone = zoo.Session(model)
        wanted = [
            tokenizer.decode([int(token) for token in alone.generate(torch.tensor([tokenizer.encode(f"{name} {turn} ")]), 8)])
            for turn in range(6)
        ]
        assert said[name] == wanted, name
        assert len(set(wanted)) > 3

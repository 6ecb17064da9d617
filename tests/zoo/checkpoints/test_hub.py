"""Downloads from a server on this machine that answers as the Hugging Face hub does, with huggingface_hub itself."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

import zoo

PROGRAM = """
import json, sys, time
import zoo

for address in sys.argv[1:]:
    since = time.perf_counter()
    try:
        model = zoo.load(address)
        said = {"loops": model.config.loops, "weight": float(model.embed.weight.double().sum())}
    except zoo.ZooError as error:
        said = {"error": str(error)}
    print(json.dumps(said | {"seconds": time.perf_counter() - since}))
"""


@contextmanager
def hub(revisions):
    """Serve the repository me/sleeper: the files, by name, of each of its revisions. A file without content is listed, but missing."""
    commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in revisions}
    files = {commits[name]: content for name, content in revisions.items()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            match self.path.partition("?")[0].strip("/").split("/"):
                case ["api", "models", "me", "sleeper", "revision", revision] if revision in commits:
                    self.answer(200, json.dumps({"id": "me/sleeper", "sha": commits[revision], "siblings": []}).encode())
                case ["api", "models", "me", "sleeper", "revision", revision]:
                    self.answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
                case ["api", "models", "me", "sleeper", "tree", commit]:
                    entries = [
                        {"type": "file", "path": name, "size": len(content or b"x"), "oid": hashlib.sha1(content or b"x").hexdigest()}
                        for name, content in files[commit].items()
                    ]
                    self.answer(200, json.dumps(entries).encode())
                case ["me", "sleeper", "resolve", commit, name] if files[commit].get(name) is not None:
                    content = files[commit][name]
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    self.answer(200, content, {"ETag": etag, "X-Repo-Commit": commit})
                case ["me", "sleeper", "resolve", _, name]:
                    self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"{name} does not exist"})
                case _:
                    self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

        def answer(self, status, content, headers=None):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def saved(folder, seed, **fields):
    """Save a tiny model; return it and its files."""
    model = zoo.create("gdn4-sleep2-hard8", layers="gdn", d_model=16, d_ff=16, seed=seed, **fields)
    zoo.save(model, folder)
    return model, {file.name: file.read_bytes() for file in folder.iterdir()}


def loaded(endpoint, folder, *addresses):
    """Load models in a process whose hub is at `endpoint`; returns what it says of each."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *addresses], env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def pulled(tmp_path_factory):
    """Two revisions of a model, what is said of each address while the hub answers, and the folder with the cache."""
    folder = tmp_path_factory.mktemp("pulled")
    model, newest = saved(folder / "main", 0)
    before, first = saved(folder / "v1", 1, loops=3)
    torn = {**newest, "model.safetensors": None}
    revisions = {"main": newest, "v1": first, "torn": torn, "bare": {"README.md": b"x"}}
    named = ("", "@v1", "@v2", "@torn", "@bare")
    with hub(revisions) as address:
        return model, before, loaded(address, folder, *(f"hf://me/sleeper{revision}" for revision in named), "hf://me/other"), folder


def test_a_model_is_pulled_by_its_revision(pulled):
    model, before, found, _ = pulled
    right, tagged, wrong, missing, bare, unknown = found
    for found, wanted in ((right, model), (tagged, before)):
        assert (found["loops"], found["weight"]) == (wanted.config.loops, wanted.embed.weight.double().sum().item())
    assert not torch.equal(model.embed.weight, before.embed.weight)
    for found, revision, why in (
        (wrong, "@v2", "Revision Not Found"),
        (missing, "@torn", "model.safetensors"),
        (bare, "@bare", "holds no model"),
        (unknown, "hf://me/other", "Repository Not Found"),
    ):
        assert "\n" not in found["error"]
        assert revision in found["error"]
        assert why in found["error"]
        assert found["seconds"] < 5


@pytest.mark.parametrize(
    ("answers", "why"),
    [(False, r"\[Errno \d+\] Connection refused"), (True, "no answer within 3 seconds|.*timed out")],
    ids=["refused", "silent"],
)
def test_without_a_network_only_what_is_here_is_loaded(pulled, answers, why):
    """No one listens at the port, or a host accepts and says nothing."""
    model, _, _, folder = pulled
    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
        if not answers:
            host.close()
        here, elsewhere = loaded(f"http://127.0.0.1:{port}", folder, "hf://me/sleeper", "hf://me/other")
    assert here["weight"] == model.embed.weight.double().sum().item()
    message = f"path: hf://me/other: me/other cannot be downloaded: ({why}); give the path of a folder instead"
    assert re.fullmatch(message, elsewhere["error"]), elsewhere
    assert elsewhere["seconds"] < 5

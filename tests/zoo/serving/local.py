"""The server in a thread of the test's process, on loopback."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request

import uvicorn

import zoo
from zoo.serving.app import make_app
from zoo.serving.connections import Gate
from zoo.serving.limits import Limits


class Local:
    """A running server: `ask` sends a request, `state` is the `Server` behind it."""

    def __init__(self, model, tokenizer, *, slots=None, streams=8, when="full", context=None, **options):
        self.pool = zoo.SessionPool(model, slots, streams=streams, when=when, context=context)
        app = make_app(self.pool, tokenizer, "model", options.pop("limits", Limits()), **options)
        self.state = app.state.server
        self.gate = Gate(self.state.limits, self.state.largest_session)
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http=self.gate.protocol))
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._uvicorn.servers[0].sockets[0].getsockname()[1]}"

    def close(self):
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def open(self, path, body=None, method=None, **headers):
        data = None if body is None else json.dumps({"model": "model", **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **headers}, method=method)
        return urllib.request.urlopen(request, timeout=60)

    def ask(self, path, body=None, method=None, **headers):
        """Status and JSON body of a response."""
        try:
            with self.open(path, body, method, **headers) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def chat(self, messages, **more):
        status, body = self.ask("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 8, **more})
        assert status == 200, body
        return body

    def complete(self, prompt, **more):
        status, body = self.ask("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8, **more})
        assert status == 200, body
        return body

    def events(self, path, body, most=None):
        """Events of a stream, or the first of them, after which the client disconnects."""
        found = []
        with self.open(path, {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    found.append(json.loads(line[6:]))
                    if len(found) == most:
                        break
        return found

    @contextlib.contextmanager
    def nothing_written(self):
        """Context in which no session is being written to the store."""
        sessions = self.state.sessions
        with sessions._lock:
            sessions._lock.wait_for(lambda: not sessions._writing)
            yield

    def stream(self, session, owner=""):
        """Tokens in a session's stream, once no request uses it."""
        for _ in range(2000):
            kept = self.state.sessions._kept.get((owner, session))
            if kept is not None and not kept.busy:
                return list(kept.tokens)
            time.sleep(0.005)
        raise AssertionError(f"{session} is busy")


def post(server, path, body=None):
    """Status and body of a response to a request without a model."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextlib.contextmanager
def local(*args, **options):
    server = Local(*args, **options)
    try:
        yield server
    finally:
        server.close()

"""The real server on loopback: the official client, many clients at once, and malformed requests."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

import zoo
from zoo.text.tokenizers import ByteTokenizer

ROOT = Path(__file__).parents[3]
FIELDS = {"layers": "attn gdn", "d_model": 32, "d_ff": 16, "vocab_size": 256}


@pytest.fixture(scope="module")
def model():
    return zoo.create("gdn4-sleep2-hard16", **FIELDS)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """A server in a process of its own, as `zoo serve` starts it."""
    folder = tmp_path_factory.mktemp("server") / "model"
    zoo.save(model, folder)
    code = "import faulthandler, signal; faulthandler.register(signal.SIGUSR1, all_threads=True); from zoo.cli import main; main()"
    limits = ["--sessions", "40", "--max-prompt", "500", "--max-tokens", "200", "--max-body", "20000", "--wait", "0.2"]
    with (folder.parent / "log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(folder), "--port", "0", *limits],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(1200):
                if match := re.search(r"http://127\.0\.0\.1:\d+", (folder.parent / "log").read_text()):
                    break
                assert server.poll() is None, (folder.parent / "log").read_text()
                time.sleep(0.1)
            yield match[0]
            assert server.poll() is None, "the server has exited"
        finally:
            server.terminate()
            assert server.wait(30) in (0, -15)
            assert "Traceback" not in (folder.parent / "log").read_text()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def alone(model, *prompts, tokens=20):
    """Greedy answers of a separate session to each prompt in turn."""
    session, tokenizer = zoo.Session(model), ByteTokenizer(256)
    answers = []
    for prompt in prompts:
        answers.append(tokenizer.decode(map(int, session.generate(torch.tensor([tokenizer.encode(prompt)]), tokens))))
    return answers


NAME = "gdn4-sleep2-hard16"
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 20}


def test_completions(client, model):
    assert [m.id for m in client.models.list()] == [NAME]
    done = client.completions.create(prompt="Once upon a time", **GREEDY)
    assert done.choices[0].text == alone(model, "Once upon a time")[0]
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (16, 20)


def test_a_session_keeps_its_stream(client, model):
    want = alone(model, "one", "two", "three")
    for prompt, answer in zip(("one", "two", "three"), want, strict=True):
        done = client.completions.create(prompt=prompt, extra_body={"session": "mine"}, **GREEDY)
        assert done.choices[0].text == answer
    assert want[1] != alone(model, "two")[0]
    with pytest.raises(openai.NotFoundError):
        client.delete("/sessions/none", cast_to=object)
    client.delete("/sessions/mine", cast_to=object)
    done = client.completions.create(prompt="two", extra_body={"session": "mine"}, **GREEDY)
    assert done.choices[0].text == alone(model, "two")[0]
    client.delete("/sessions/mine", cast_to=object)


def test_chat(client, model):
    first = alone(model, "user: hi\nassistant: ")[0]
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **GREEDY)
    assert answer.choices[0].message.content == first
    # a session continues, whether the client sends the whole conversation or, with `append`, only the new messages
    want = alone(model, f"user: hi\nassistant: {first}\nuser: and?\nassistant: ")[0]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    for session, messages, append in (("whole", turns, False), ("new", turns[2:], True)):
        client.chat.completions.create(messages=turns[:1], extra_body={"session": session}, **GREEDY)
        answer = client.chat.completions.create(messages=messages, extra_body={"session": session, "append": append}, **GREEDY)
        assert answer.choices[0].message.content == want
        assert answer.usage.prompt_tokens_details.cached_tokens >= len("user: hi\nassistant: ")
        client.delete(f"/sessions/{session}", cast_to=object)


def test_bytes_of_tokens(client, model):
    """Bytes of the tokens join to the answer, also where a character spans several tokens."""
    session = zoo.Session(model)
    ids = [int(token) for token in session.generate(torch.tensor([ByteTokenizer(256).encode("user: hi\nassistant: ")]), 20)]
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=3, **GREEDY)
    content = chat.choices[0].logprobs.content
    assert [entry.bytes for entry in content] == [[token] for token in ids]
    assert max(ids) > 127  # bytes that are no characters
    for entry in (*content, *(other for each in content for other in each.top_logprobs)):
        (byte,) = entry.bytes
        assert entry.token == (chr(byte) if byte < 128 else f"\\x{byte:02x}")
    answer = client.completions.create(prompt="user: hi\nassistant: ", logprobs=3, **GREEDY)
    found = answer.choices[0].logprobs
    assert found.tokens == [chr(token) if token < 128 else f"bytes:\\x{token:02x}" for token in ids]
    assert [len(top) for top in found.top_logprobs] == [3] * 20


def test_streaming(client, model):
    pieces = list(client.completions.create(prompt="abc", stream=True, **GREEDY))
    assert "".join(p.choices[0].text for p in pieces) == alone(model, "abc")[0]
    assert pieces[-1].choices[0].finish_reason == "length"
    pieces = list(client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], stream=True, **GREEDY))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == alone(model, "user: hi\nassistant: ")[0]


def test_stop_strings(client, model):
    whole = alone(model, "abc")[0]
    stop = whole[7:9]
    for stream in (False, True):
        done = client.completions.create(prompt="abc", stop=[stop, "never"], stream=stream, **GREEDY)
        parts = list(done) if stream else [done]
        assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "'other' does not exist"),
        ({"max_tokens": 201}, openai.BadRequestError, "max_tokens: 201 is more than 200"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"prompt": "x" * 501}, openai.BadRequestError, "501 tokens are more than 500"),
        ({"prompt": "x" * 20001}, openai.APIStatusError, "are more than 20000"),
        ({"prompt": ""}, openai.BadRequestError, "prompt: empty; want at least one token"),
        ({"prompt": [256]}, openai.BadRequestError, "vocabulary is 0 to 255"),
        ({"prompt": [["a"]]}, openai.BadRequestError, "prompt"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense: there is no such field"),
        ({"prompt": [-1]}, openai.BadRequestError, "prompt"),
        ({"prompt": [True]}, openai.BadRequestError, "prompt"),
        ({"prompt": []}, openai.BadRequestError, "prompt: empty; want at least one token"),
        ({"stop": ""}, openai.BadRequestError, "stop"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"seed": 2**63}, openai.BadRequestError, "seed"),
        ({"extra_body": {"top_k": 0}}, openai.BadRequestError, "top_k"),
        ({"extra_body": {"repetition_penalty": 0}}, openai.BadRequestError, "repetition_penalty"),
        ({"extra_body": {"stream": "yes"}}, openai.BadRequestError, "stream"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n: "),
        ({"extra_body": {"session": "a b"}}, openai.BadRequestError, "session"),
    ],
)
def test_refused_requests(client, change, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        client.completions.create(**{"prompt": "x", **GREEDY, **change})
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "messages",
    ["hi", [], ["hi"], [{"role": "user"}], [{"content": "hi"}], [{"role": "robot", "content": "hi"}], [{"role": "user", "content": 1}]],
    ids=str,
)
def test_refused_conversations(url, messages):
    status, answer = raw(url, "/v1/chat/completions", json.dumps({"model": NAME, "messages": messages}).encode())
    error = json.loads(answer)["error"]
    assert status == 400
    assert error["param"].startswith("messages")
    assert error["message"].startswith(error["param"])


def raw(url, path, body, **headers):
    request = urllib.request.Request(url + path, body, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"a": NaN}', 400),
        (b"[" * 15_000, 400),
        (b'{"model": "\\ud800"}', 400),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed(url, path, body, status):
    code, answer = raw(url, path, body)
    assert code == status
    message = json.loads(answer)["error"]["message"]
    assert message.startswith("body: not JSON: ") or body != b"{", message


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/sessions/x/sleep"])
@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain"])
def test_a_body_that_is_not_sent_as_json(url, path, kind):
    """As curl sends it without a header."""
    code, answer = raw(url, path, json.dumps({**GREEDY, "prompt": "a"}).encode(), **{"content-type": kind})
    assert code == 400
    assert json.loads(answer)["error"]["message"] == "body: its content type is not JSON; want Content-Type: application/json"


def test_a_large_body_without_a_length(url):
    def chunks():
        for _ in range(21):
            yield b"x" * 1000

    code, answer = raw(url, "/v1/completions", chunks(), **{"transfer-encoding": "chunked"})
    assert code == 413
    assert "more than 20000 bytes" in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/v1/models/", 404), ("/v1/chat/completions", 405)])
def test_unknown_routes_are_named(url, path, status):
    """A path with a slash too many too: a redirect would lead to the host of the request."""
    code, answer = raw(url, path, None)
    assert code == status
    assert json.loads(answer)["error"]["message"].startswith(f"GET {path}: ")


def test_metrics(url, client):
    client.completions.create(prompt="abc", **GREEDY)
    code, text = raw(url, "/metrics", None)
    assert code == 200
    numbers = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert float(numbers['zoo_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert float(numbers['zoo_tokens_total{kind="completion"}']) >= 20
    assert float(numbers["zoo_sleeps"]) >= 1
    assert float(numbers["zoo_first_token_seconds_count"]) >= 1


def test_clients_at_once(url, client, model):
    """32 conversations at the same time: each answer is as if it were alone."""
    want = [alone(model, f"talk {n}", "more", tokens=8) for n in range(32)]

    def talk(n):
        how = {**GREEDY, "max_tokens": 8, "extra_body": {"session": f"talk-{n}"}}
        return [client.completions.create(prompt=p, **how).choices[0].text for p in (f"talk {n}", "more")]

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(talk, range(32))) == want
    for n in range(32):
        client.delete(f"/sessions/talk-{n}", cast_to=object)


def test_one_request_of_a_session_at_a_time_and_too_many_sessions(client):
    with client.completions.create(prompt="a", stream=True, model=NAME, max_tokens=200, extra_body={"session": "one"}) as slow:
        next(iter(slow))
        with pytest.raises(openai.ConflictError, match="busy"):
            client.completions.create(prompt="a", model=NAME, extra_body={"session": "one"})
        with pytest.raises(openai.ConflictError, match="busy"):
            client.delete("/sessions/one", cast_to=object)
    for _ in range(100):  # the server notices that a client has disconnected when it writes
        with contextlib.suppress(openai.ConflictError):
            client.delete("/sessions/one", cast_to=object)
            break
        time.sleep(0.1)
    for n in range(40):
        client.completions.create(prompt="a", model=NAME, max_tokens=1, extra_body={"session": f"s{n}"})
    with pytest.raises(openai.RateLimitError, match="all 40 streams are in use"):
        client.completions.create(prompt="a", model=NAME, max_tokens=1)
    for n in range(40):
        client.delete(f"/sessions/s{n}", cast_to=object)


@pytest.mark.parametrize("examples", [15, pytest.param(500, marks=pytest.mark.extended)])
def test_fuzzing(url, examples):
    """schemathesis with the OpenAPI schema: no server error, and every response matches the schema."""
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--seed", "1", "--phases", "fuzzing",
            "--max-examples", str(examples), "--checks", CHECKS, "--suppress-health-check", "all", "--generation-database", "none",
        ],
        capture_output=True, text=True, check=False, cwd="/tmp",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection"

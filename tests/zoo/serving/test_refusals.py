"""Refused requests: each error names the field, its value and what is allowed."""

import urllib.error

import pytest

import zoo
from tests.zoo.serving.local import local
from zoo.text.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def server():
    model = zoo.create("gdn4-sleep2-hard16", layers="gdn", d_model=16, d_ff=16, vocab_size=256)
    with local(model, ByteTokenizer(256)) as running:
        yield running


PROMPTS = "want text, token ids, a list of texts, or a list of lists of token ids; at most 2048 prompts"
NAMES = "want 1 to 64 letters, digits, _ and -"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ["a", [1]]}, f'prompt: ["a", [1]]; {PROMPTS}'),
        ({"prompt": [[1], "a"]}, f'prompt: [[1], "a"]; {PROMPTS}'),
        ({"prompt": [1, "a"]}, f'prompt: [1, "a"]; {PROMPTS}'),
        ({"prompt": [1, [2]]}, f"prompt: [1, [2]]; {PROMPTS}"),
        ({"prompt": {"text": "a"}}, f'prompt: {{"text": "a"}}; {PROMPTS}'),
        ({"session": "a b"}, f'session: "a b"; {NAMES}'),
        ({"session": 5}, f"session: 5; {NAMES}"),
        ({"session": "x" * 300}, f'session: "{"x" * 79}...; {NAMES}'),
        ({"logit_bias": {"97": None}}, "logit_bias.97: null; want a number from -100 to 100"),
        ({"logit_bias": {"97": 101}}, "logit_bias.97: 101; want a number from -100 to 100"),
        ({"logit_bias": {"a": 1}}, 'logit_bias.a: "a"; want a token id'),
        ({"stop": ["a", ""]}, 'stop: ["a", ""]; want text or a list of texts, none of them empty'),
        ({"temperature": 3}, "temperature: 3; must be less than or equal to 2.0"),
        ({"stream": "yes"}, 'stream: "yes"; want true or false'),
        ({"echo": "\u00fc"}, 'echo: "\u00fc"; want true or false'),
        ({"n": 2, "session": "s"}, "n: 2; want 1 in a session, which continues from its answer"),
        ({"prompt": ["a", "b"], "session": "s"}, "prompt: 2 prompts; want 1 in a session"),
        ({"prompt": None}, "prompt: is missing"),
    ],
)
def test_completions(server, change, message):
    status, answer = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1, **change})
    assert (status, answer["error"]["message"]) == (400, message)
    assert answer["error"]["param"] == message.partition(":")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "data:,"}}], "messages.0.content.0.type: \"image_url\"; allowed: 'text'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "messages.0.content.1.type: \"input_audio\"; allowed: 'text'"),
        ([{"type": "text"}], "messages.0.content.0.text: is missing"),
        (1, "messages.0.content: 1; want text"),
    ],
)
def test_parts_of_messages(server, content, message):
    status, answer = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 1})
    assert (status, answer["error"]["message"]) == (400, message)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"x-session-id": "a b"}, f"x-session-id: 'a b'; {NAMES}"),
        (
            {"x-session-id": "a", "x-openwebui-chat-id": "b"},
            "session: x-session-id: 'a' and x-openwebui-chat-id: 'b'; the body",
        ),
    ],
)
def test_session_headers(server, headers, message):
    status, answer = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1}, **headers)
    assert status == 400
    assert answer["error"]["message"].startswith(message)


def test_a_session_by_header_takes_one_prompt_and_one_answer(server):
    for change, field in (({"n": 2}, "n"), ({"prompt": ["a", "b"]}, "prompt")):
        status, answer = server.ask("/v1/completions", {"prompt": "a", **change}, **{"x-session-id": "s"})
        assert (status, answer["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    "change", [{"prompt": "\ud800"}, {"prompt": ["a", "\udfff"]}, {"stop": "\ud800"}, {"user": "\ud800"}, {"\ud800": 1}]
)
def test_text_that_is_no_unicode(server, change):
    assert server.ask("/v1/completions", {"prompt": "a", **change})[0] == 400
    assert server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]})[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/models", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("HEAD", "/v1/completions", "POST"),
        ("PUT", "/v1/sessions/s", "DELETE, GET, HEAD"),
        ("POST", "/v1/sessions/s", "DELETE, GET, HEAD"),
        ("GET", "/v1/sessions/s/fork", "POST"),
        ("POST", "/page.js", "GET, HEAD"),
    ],
)
def test_a_refused_method_lists_those_of_the_path(server, method, path, allowed):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.open(path, method=method)
    assert (refused.value.code, refused.value.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/openapi.json", "/", "/v1/sessions"])
def test_head_is_get_without_the_body(server, path):
    with server.open(path) as get, server.open(path, method="HEAD") as head:
        assert (get.status, head.status, head.read()) == (200, 200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.read()))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.open("/v1/models/none", method="HEAD")

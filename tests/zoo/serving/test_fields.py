"""Every field of the official client's requests works as documented, or is refused in a 400 that names it."""

import math
from typing import get_type_hints

import pytest
import torch
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat

import zoo
from tests.zoo.serving.local import local
from zoo.serving.app import Limits
from zoo.text.tokenizers import ByteTokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools. {% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
A, B, X = ord("a"), ord("b"), ord("x")
LOGITS = {A: 1.0, B: 0.9, X: -1.0}
REFUSED = 400
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nonsense"}}}  # right ones: test_json_schema.py


class WithTools(ByteTokenizer):
    """Bytes, with a chat template that takes tools."""

    def __init__(self):
        super().__init__(256, templates={"default": TEMPLATE})


@pytest.fixture(scope="module")
def model():
    """It says "aaaaaa" to everything; "b" is the next most likely token."""
    made = zoo.create("gdn4-sleep2-hard64", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "head.weight")):
                weight.zero_()
            if name.endswith("embed.weight"):
                weight.fill_(1)
        for token, logit in LOGITS.items():
            made.head.weight[token] = logit / made.config.d_model
    return made


@pytest.fixture(scope="module")
def server(model):
    with local(model, WithTools(), limits=Limits(tokens=50)) as running:  # 50: the default of chat
        yield running


def text(answer):
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def same(answer):
    return text(answer) == "aaaaaa"


def varies(answer):
    return text(answer) != "aaaaaa"


LEAST = -math.log(sum(map(math.exp, LOGITS.values())) + 256 - len(LOGITS))  # log-probability of a token whose logit is 0
BOTH = {
    "frequency_penalty": [(0, same), (2.0, lambda answer: text(answer).startswith("ab")), (3.0, REFUSED)],
    "presence_penalty": [(0, same), (2.0, lambda answer: text(answer).startswith("ab")), (-3.0, REFUSED)],
    "logit_bias": [({}, same), ({str(A): -100}, lambda answer: text(answer) == "bbbbbb"), ({"999": 1}, REFUSED), ({str(A): 101}, REFUSED)],
    "max_tokens": [(2, lambda answer: text(answer) == "aa" and answer["choices"][0]["finish_reason"] == "length"), (51, REFUSED)],
    "model": [("other", 404), (None, REFUSED)],
    "n": [(1, same), (2, lambda answer: [choice["index"] for choice in answer["choices"]] == [0, 1]), (0, REFUSED), (129, REFUSED)],
    "seed": [(3, same), (-1, same), (2**63, REFUSED)],
    "stop": [("zz", same), (["a"], lambda answer: text(answer) == "" and answer["choices"][0]["finish_reason"] == "stop"), ("", REFUSED)],
    "stream": [(False, same), ("yes", REFUSED)],
    "stream_options": [({"include_usage": True}, REFUSED)],  # only with stream
    "temperature": [(0, same), (1e-40, same), (2, varies), (2.1, REFUSED)],
    "top_p": [(1, same), (0.5, same), (0, REFUSED)],
    "user": [("me", same), (1, REFUSED)],
}
COMPLETIONS = BOTH | {
    "prompt": [
        ("hello", same),
        ([1, 2], same),
        (["a", "b"], lambda answer: [choice["index"] for choice in answer["choices"]] == [0, 1]),
        ([[1, 2], [3]], lambda answer: answer["usage"]["prompt_tokens"] == 3),
        (None, REFUSED),
        ([[256]], REFUSED),
    ],
    "best_of": [(1, same), (2, REFUSED)],
    "echo": [(False, same), (True, lambda answer: text(answer) == "helloaaaaaa")],
    "logprobs": [
        (
            2,
            lambda answer: (
                answer["choices"][0]["logprobs"]
                == {
                    "tokens": ["a"] * 6,
                    "token_logprobs": [pytest.approx(LEAST + 1.0, abs=1e-4)] * 6,
                    "top_logprobs": [{"a": pytest.approx(LEAST + 1.0, abs=1e-4), "b": pytest.approx(LEAST + 0.9, abs=1e-4)}] * 6,
                    "text_offset": [0, 1, 2, 3, 4, 5],
                }
            ),
        ),
        (0, lambda answer: answer["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 6),
        (6, REFUSED),
    ],
    "suffix": [(None, same), ("zzz", REFUSED)],
}
CHAT = BOTH | {
    "messages": [
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], same),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], REFUSED),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}, {"role": "tool", "tool_call_id": "1", "content": "b"}], same),
        ([], REFUSED),
        ([{"role": "robot", "content": "hi"}], REFUSED),
    ],
    "logprobs": [
        (False, same),
        (
            True,
            lambda answer: (
                answer["choices"][0]["logprobs"]["content"]
                == [{"token": "a", "bytes": [A], "logprob": pytest.approx(LEAST + 1.0, abs=1e-4), "top_logprobs": []}] * 6
            ),
        ),
        (2, REFUSED),
    ],
    "top_logprobs": [(2, REFUSED)],  # only with logprobs
    "max_completion_tokens": [(2, lambda answer: text(answer) == "aa"), (0, REFUSED), (51, REFUSED)],
    "tools": [([TOOL], lambda answer: answer["usage"]["prompt_tokens"] == len("1 tools. user: hello\nassistant: ")), ([], REFUSED)],
    "tool_choice": [("none", same), ("auto", same), ("required", REFUSED), (TOOL, REFUSED)],
    "parallel_tool_calls": [(True, same), (False, REFUSED)],
    "function_call": [("none", same), ("auto", REFUSED)],
    "functions": [(None, same), ([{"name": "f"}], REFUSED)],
    "response_format": [({"type": "text"}, same), ({"type": "json_object"}, REFUSED), (SCHEMA, REFUSED)],
    "modalities": [(["text"], same), (["text", "audio"], REFUSED)],
    "metadata": [({"a": "b"}, same), ({"a": 1}, REFUSED)],
    "store": [(False, same), (True, REFUSED)],
    "service_tier": [("auto", same), ("default", same), ("flex", REFUSED)],
    "verbosity": [("medium", same), ("low", REFUSED)],
    "safety_identifier": [("me", same)],
    "prompt_cache_key": [("mine", same)],
    "prompt_cache_options": [({"mode": "explicit"}, REFUSED)],
    "prompt_cache_retention": [(None, same), ("24h", REFUSED)],
    "audio": [(None, same), ({"voice": "ash", "format": "mp3"}, REFUSED)],
    "moderation": [(None, same), ({"model": "m"}, REFUSED)],
    "prediction": [(None, same), ({"type": "content", "content": "a"}, REFUSED)],
    "reasoning_effort": [(None, same), ("low", REFUSED)],
    "web_search_options": [({}, REFUSED)],
}
ROUTES = {
    "/v1/completions": (COMPLETIONS, completion, {"prompt": "hello"}),
    "/v1/chat/completions": (CHAT, chat, {"messages": [{"role": "user", "content": "hello"}]}),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_of_the_client(server, route):
    decided, types, ask = ROUTES[route]
    names = {*get_type_hints(types.CompletionCreateParamsNonStreaming), *get_type_hints(types.CompletionCreateParamsStreaming)}
    assert decided.keys() == names
    wrong = []
    for name, values in decided.items():
        for value, want in values:
            few = {} if name == "max_completion_tokens" else {"max_tokens": 6}
            status, answer = server.ask(route, {**ask, **few, "temperature": 0, name: value})
            if not (status == 200 and want(answer)) if callable(want) else not (status == want and name in str(answer["error"])):
                wrong.append((name, value, status, answer))
    assert not wrong


@pytest.mark.parametrize("route", ROUTES)
def test_null_is_absent(server, route):
    decided, _, ask = ROUTES[route]
    optional = {name: None for name in decided if name not in (*ask, "model")}
    assert server.ask(route, {**ask, **optional})[1]["usage"]["completion_tokens"] in (16, 50)


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_fields(server, route):
    status, answer = server.ask(route, {**ROUTES[route][2], "temprature": 1})
    assert (status, answer["error"]["message"], answer["error"]["param"]) == (400, "temprature: there is no such field", "temprature")


@pytest.mark.parametrize("route", ROUTES)
def test_top_p_and_seed(server, route):
    """Sampled: from the fewest tokens whose probabilities add up to `top_p`; the same answer for the same `seed`, another for others."""

    def said(**how):
        status, answer = server.ask(route, {**ROUTES[route][2], "max_tokens": 40, "temperature": 1, **how})
        assert status == 200
        return text(answer)

    a, b = (math.exp(LEAST + LOGITS[token]) for token in (A, B))
    assert said(top_p=0.99 * a) == "a" * 40
    for total in (1.01 * a, 0.99 * (a + b)):
        assert set(said(top_p=total, seed=0)) == set("ab")
    assert len(set(said(top_p=1.01 * (a + b), seed=0))) == 3
    answers = [said(seed=seed) for seed in (*range(5), *range(5))]
    assert answers[:5] == answers[5:]
    assert len(set(answers)) == 5
    assert len({said() for _ in range(5)}) == 5  # without one, every answer is another


def test_scoring_a_text(server, model):
    """`echo` with `max_tokens: 0` returns the log-probability of each prompt token: those of the model itself."""
    ids = list(b"hello axb")
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    answer = server.complete(ids, max_tokens=0, echo=True, logprobs=1)
    found = answer["choices"][0]
    assert found["text"] == "hello axb"
    assert found["logprobs"]["token_logprobs"] == [None, *(pytest.approx(value, abs=1e-4) for value in want)]
    assert found["logprobs"]["top_logprobs"][0] is None
    assert found["logprobs"]["text_offset"] == list(range(9))
    assert answer["usage"]["completion_tokens"] == 0


def test_the_stream(server):
    """The role is in the first delta only; usage comes last, and only if it is asked for."""
    ask = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 4, "n": 2, "logprobs": True}
    plain = server.events("/v1/chat/completions", ask)
    assert not any("usage" in event for event in plain)
    for index in (0, 1):
        choices = [event["choices"][0] for event in plain if event["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas) == "aaaa"
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
        assert sum(len(choice["logprobs"]["content"]) for choice in choices) == 4
    counted = server.events("/v1/chat/completions", {**ask, "stream_options": {"include_usage": True}})
    assert all(event["usage"] is None for event in counted[:-1])
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"]["completion_tokens"] == 8


def test_an_answer_ends_with_the_context():
    whole = zoo.create("gdn4", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)
    with local(whole, ByteTokenizer(256), context=12) as server:
        answer = server.complete("hello", max_tokens=20)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 7
        assert server.ask("/v1/completions", {"prompt": "x" * 12})[0] == 400


def test_keys_and_health(model):
    """Sessions are bound to the key of their owner."""
    key, other = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    with local(model, ByteTokenizer(256), keys=["one", "two"]) as server:
        assert server.ask("/health")[0] == server.ask("/ready")[0] == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "one"}):
            assert server.ask("/v1/models", **headers)[0] == 401
        assert server.ask("/v1/models/model", **key)[1]["id"] == "model"
        assert server.ask("/v1/models/none", **key)[0] == 404
        assert server.ask("/v1/completions", {"prompt": "a", "session": "s"}, **key)[0] == 200
        assert server.ask("/v1/sessions/s", method="DELETE", **other)[0] == 404
        assert server.ask("/v1/completions", {"prompt": "a"}, **key, **{"x-session-id": "s"})[0] == 200
        assert len(server.stream("s", "Bearer one")) == 34
        headers = {"x-session-id": "s", "x-openwebui-chat-id": "t"}
        status, answer = server.ask("/v1/completions", {"prompt": "a"}, **key, **headers)
        assert (status, answer["error"]["param"]) == (400, "session")
        assert server.ask("/v1/sessions/s", method="DELETE", **key)[0] == 200
        server.state.draining = True
        assert server.ask("/health")[0] == 200
        assert server.ask("/ready")[0] == server.ask("/v1/completions", {"prompt": "a"}, **key)[0] == 503

"""Answers under a JSON schema parse and validate, from a model with random weights and wherever it runs."""

import builtins
import json

import jsonschema_rs
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import zoo
from tests.zoo.serving.local import local
from zoo.errors import ZooError
from zoo.text.json_schema import JsonSchema
from zoo.text.tokenizers import ByteTokenizer, load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "size": {"type": "integer", "minimum": 0, "maximum": 300},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}


def response_format(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}}


def check(text):
    jsonschema_rs.validate(SCHEMA, json.loads(text))


@pytest.fixture(scope="module")
def model():
    return zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)


@pytest.fixture(scope="module")
def server(model):
    with local(model, ByteTokenizer(256)) as running:
        yield running


def sampled(session, tokenizer, seed):
    schema = JsonSchema(SCHEMA, tokenizer, session.model.config.vocab_size)
    prompt = torch.tensor([tokenizer.encode("hi")])
    tokens = list(map(int, session.generate(prompt, 100, temperature=1.0, top_k=40, seed=seed, constraint=schema.answer())))
    return tokenizer.decode(token for token in tokens if token not in tokenizer.stop)


def test_a_session_and_a_pool(model):
    with zoo.SessionPool(model) as pool:
        for seed in range(3):
            text = sampled(zoo.Session(model), ByteTokenizer(256), seed)
            check(text)
            stream = pool.open()
            assert sampled(stream, ByteTokenizer(256), seed) == text
            stream.sleep()  # the generation has ended
            stream.close()


@pytest.mark.parametrize("end", [None, "<|end|>"])
def test_tokens_of_several_bytes(tmp_path, end):
    """With an end token, which is allowed only where the JSON is complete, and without one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [end] if end else []
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(['{"name": "bc", "size": 25, "tags": ["a", "bc"]}'] * 3, trainer)
    model = zoo.create("gdn4-sleep2-hard16", layers="gdn", d_model=16, d_ff=16, vocab_size=made.get_vocab_size() + 5)  # as if padded
    zoo.save(model, tmp_path / "model")
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": end} if end else {})}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "model", model.config.vocab_size)
    assert len(tokenizer.stop) == len(special)
    for seed in range(5):
        check(sampled(zoo.Session(model), tokenizer, seed))


def test_the_server(server):
    """Streamed or not, several answers, and with log-probabilities, which are those of the model without the schema."""
    for more in ({"seed": 1}, {"seed": 2, "n": 3, "logprobs": True}, {"temperature": 0, "top_p": 0.9, "max_tokens": 500}):
        status, answer = server.ask("/v1/chat/completions", {**ASK, **more, **response_format({**SCHEMA})})
        assert status == 200, answer
        for choice in answer["choices"]:
            assert choice["finish_reason"] == "stop"
            check(choice["message"]["content"])
    events = server.events("/v1/chat/completions", {**ASK, "seed": 1, **response_format(SCHEMA)})
    check("".join(event["choices"][0]["delta"].get("content", "") for event in events))
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    status, answer = server.ask("/v1/chat/completions", {**ASK, "max_tokens": 3, **response_format(SCHEMA)})
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (response_format({"type": "nonsense"})["response_format"], "response_format: schema: Invalid type: nonsense"),
        (response_format({"not": {}})["response_format"], "response_format: schema: Unimplemented keys: [\"not\"]"),
        ({"type": "json_schema"}, "response_format.json_schema: is missing"),
        ({"type": "text", "json_schema": {"name": "s"}}, "response_format.json_schema: only with type: json_schema"),
        ({"type": "json_object"}, "response_format.type: \"json_object\"; allowed: 'text', 'json_schema'"),
        ({"type": "json_schema", "json_schema": {"name": "a b"}}, "response_format.json_schema.name: \"a b\"; want 1 to 64 letters"),
    ],
)  # fmt: skip
def test_refused_formats(server, form, message):
    status, answer = server.ask("/v1/chat/completions", {**ASK, "response_format": form})
    assert status == 400
    assert answer["error"]["message"].startswith(message)


def test_without_the_extra(server, monkeypatch):
    def importing(name, *args, **kwargs):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", importing)
    status, answer = server.ask("/v1/chat/completions", {**ASK, **response_format(SCHEMA)})
    assert status == 400
    assert answer["error"]["param"] == "response_format"
    assert "pip install 'sleep-zoo[schema]'" in answer["error"]["message"]


def test_constraints_are_for_one_stream(model):
    schema = JsonSchema(SCHEMA, ByteTokenizer(256), 256)
    with pytest.raises(ZooError, match="constraint: 2 streams; want 1"):
        zoo.Session(model, 2).generate(torch.zeros(2, 1, dtype=torch.int64), 1, constraint=schema.answer())


@pytest.mark.extended
def test_a_bundle(model, tmp_path):
    from zoo.export import export, load

    export(model, tmp_path / "bundle")
    text = sampled(load(tmp_path / "bundle"), ByteTokenizer(256), 0)
    check(text)
    assert text == sampled(zoo.Session(model), ByteTokenizer(256), 0)

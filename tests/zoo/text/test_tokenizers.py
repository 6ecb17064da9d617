"""Text to token ids and back, token by token."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import zoo
from zoo.text.tokenizers import ByteTokenizer, load_tokenizer

WORDS = "The quick brown fox, naïve café, 日本語, 🦊🦊 and ﬀ. " * 3


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    config = {"chat_template": template, "eos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def decoded(tokenizer, ids):
    decode = tokenizer.decoder()
    return [decode(i) for i in ids]


def test_round_trip(folder):
    for tokenizer in (ByteTokenizer(256), load_tokenizer(folder, 1000)):
        pieces = decoded(tokenizer, tokenizer.encode(WORDS))
        assert "".join(pieces) == WORDS
        assert not any("\ufffd" in piece for piece in pieces)  # an incomplete character is not shown


def test_bytes_that_are_not_text():
    tokenizer = ByteTokenizer(300)
    assert "".join(decoded(tokenizer, [72, 255, 105, 299])) == "H\ufffdi"
    assert tokenizer.encode("\ud800") == [63]
    assert bytes(tokenizer.chat([{"role": "user", "content": "hi"}])).decode() == "user: hi\nassistant: "
    with pytest.raises(zoo.ZooError, match="vocab_size: 3; text in bytes needs 256"):
        load_tokenizer(None, 3)


def test_end_tokens_and_chat_template_come_from_the_checkpoint(folder):
    tokenizer = load_tokenizer(folder, 1000)
    assert tokenizer.stop == (0, 7)
    ids = tokenizer.chat([{"role": "user", "content": "fox"}])
    assert "".join(decoded(tokenizer, ids)) == "[user] fox[assistant]"
    assert 0 in ids
    assert tokenizer.encode("\ud800") == tokenizer.encode("?")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 / 0 }}"}))
    with pytest.raises(zoo.ZooError, match="chat_template: division by zero"):
        load_tokenizer(folder, 1000).chat([])


def test_damaged_or_mismatched_files(folder):
    with pytest.raises(zoo.ZooError, match=r"tokenizer.json: \d+ tokens; the model has 20"):
        load_tokenizer(folder, 20)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(zoo.ZooError, match=r"generation_config\.json: cannot be read"):
        load_tokenizer(folder, 1000)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(zoo.ZooError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(folder, 1000)

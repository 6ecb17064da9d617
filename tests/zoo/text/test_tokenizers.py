"""Text to tokens and back, token by token."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import zoo
from zoo.text.tokenizers import Bytes, text_of

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


def decoded(text, ids):
    decode = text.decoder()
    return [decode(i) for i in ids]


def test_there_and_back(folder):
    for text in (Bytes(256), text_of(folder, 1000)):
        pieces = decoded(text, text.encode(WORDS))
        assert "".join(pieces) == WORDS
        assert not any("\ufffd" in piece for piece in pieces)  # half a character is not shown


def test_bytes_that_are_no_text():
    text = Bytes(300)
    assert "".join(decoded(text, [72, 255, 105, 299])) == "H\ufffdi"
    assert text.encode("\ud800") == [63]
    assert bytes(text.chat([{"role": "user", "content": "hi"}])).decode() == "user: hi\nassistant: "
    with pytest.raises(zoo.ZooError, match="vocab_size: 3; text in bytes needs 256"):
        text_of(None, 3)


def test_a_checkpoint_says_what_ends_an_answer_and_how_a_conversation_is_written(folder):
    text = text_of(folder, 1000)
    assert text.stop == (0, 7)
    ids = text.chat([{"role": "user", "content": "fox"}])
    assert "".join(decoded(text, ids)) == "[user] fox[assistant]"
    assert 0 in ids
    assert text.encode("\ud800") == text.encode("?")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 / 0 }}"}))
    with pytest.raises(zoo.ZooError, match="chat_template: division by zero"):
        text_of(folder, 1000).chat([])


def test_files_that_do_not_fit(folder):
    with pytest.raises(zoo.ZooError, match=r"tokenizer.json: \d+ tokens; the model has 20"):
        text_of(folder, 20)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(zoo.ZooError, match=r"generation_config\.json: cannot be read"):
        text_of(folder, 1000)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(zoo.ZooError, match=r"tokenizer\.json: cannot be read"):
        text_of(folder, 1000)

"""Text to token ids and back, token by token."""

import io
import json
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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


def test_bytes_of_tokens(folder):
    """Bytes of the tokens join to the text, also where a character spans several tokens."""
    for tokenizer in (ByteTokenizer(256), load_tokenizer(folder, 1000)):
        assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(WORDS))) == WORDS.encode()
    fallback = Tokenizer(
        models.BPE({name: i for i, name in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256))])}, [], byte_fallback=True)
    )
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    (folder / "tokenizer_config.json").unlink()
    fallback.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, 1000)
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode("é🦊"))) == "é🦊".encode()


def test_bytes_that_are_not_text():
    tokenizer = ByteTokenizer()
    assert "".join(decoded(tokenizer, [72, 255, 105, 299])) == "H\ufffdi"
    assert tokenizer.encode("\ud800") == [63]
    assert bytes(tokenizer.chat([{"role": "user", "content": "hi"}])).decode() == "user: hi\nassistant: "
    for size in (3, 257, 1000):
        with pytest.raises(zoo.ZooError, match=f"vocab_size: {size}; text in bytes needs 256, and the model has no tokenizer"):
            load_tokenizer(None, size)


def test_end_tokens_and_chat_template_come_from_the_checkpoint(folder):
    tokenizer = load_tokenizer(folder, 1000)
    assert tokenizer.stop == (0, 7)
    assert tokenizer.decode(tokenizer.encode(WORDS)) == WORDS
    ids = tokenizer.chat([{"role": "user", "content": "fox"}])
    assert "".join(decoded(tokenizer, ids)) == "[user] fox[assistant]"
    assert 0 in ids
    assert tokenizer.encode("\ud800") == tokenizer.encode("?")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 / 0 }}"}))
    with pytest.raises(zoo.ZooError, match="chat template: division by zero"):
        load_tokenizer(folder, 1000).chat([])


def test_damaged_or_mismatched_files(folder):
    with pytest.raises(zoo.ZooError, match=r"tokenizer.json: \d+ tokens; the model has 20"):
        load_tokenizer(folder, 20)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(zoo.ZooError, match=r"generation_config\.json: not JSON"):
        load_tokenizer(folder, 1000)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(zoo.ZooError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(folder, 1000)


def test_a_vocabulary_without_the_unknown_token(tmp_path):
    Tokenizer(models.WordLevel({"hi": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(zoo.ZooError, match="the tokenizer cannot encode: WordLevel error"):
        load_tokenizer(tmp_path, 10).encode("other")


def test_end_tokens_are_found_in_every_usual_place(folder):
    places = {"generation_config.json": {"eos_token_id": [1, 2]}, "config.json": {"text_config": {"eos_token_id": 3}}}
    for file, content in places.items():
        (folder / file).write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "zoo.yaml").write_text("name: a\nupstream: {text_config: {eos_token_id: [4]}}\n")
    assert load_tokenizer(folder, 1000).stop == (1, 2, 0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "do_sample": True}))
    assert load_tokenizer(folder, 1000).stop == (3, 0)
    (folder / "config.json").unlink()
    assert load_tokenizer(folder, 1000).stop == (4, 0)
    (folder / "tokenizer_config.json").unlink()
    (folder / "zoo.yaml").unlink()
    assert load_tokenizer(folder, 1000).stop == ()


@pytest.mark.extended
@pytest.mark.parametrize("transformers", [True, False])
def test_tokens_equal_those_of_transformers(folder, monkeypatch, transformers):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.post_processor = processors.TemplateProcessing("<end> $A <end>", special_tokens=[("<end>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "<end>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    special = {"add_bos_token": False, "bos_token": "<end>", "eos_token": end, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    right = AutoTokenizer.from_pretrained(folder)(WORDS, truncation=False, padding=False).input_ids
    if not transformers:
        monkeypatch.setitem(sys.modules, "transformers", None)
    ours = load_tokenizer(folder, 1000)
    assert ours.encode(WORDS) == right
    assert right[0] == right[-1] == 0
    assert ours.encode(WORDS, special=False) == right[1:-1]
    assert ours.special.items() >= {"bos_token": "<end>", "eos_token": "<end>"}.items()


def test_a_tokenizer_in_another_format_needs_transformers(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(zoo.ZooError, match="pip install transformers, which reads other formats"):
        load_tokenizer(tmp_path, 256)


def test_no_code_of_a_folder_is_run(tmp_path, monkeypatch):
    """Not even if the user's next line would answer transformers' question with yes."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizer\nclass Own(PreTrainedTokenizer): pass\n"
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    with pytest.raises(zoo.ZooError, match=r"^[^\n]+$"):
        load_tokenizer(tmp_path, 256)
    assert not mark.exists()
    assert len(sys.stdin.read()) == 18


@pytest.mark.parametrize("transformers", [True, False])
def test_pieces_of_sentencepiece_keep_their_spaces(tmp_path, monkeypatch, transformers):
    if not transformers:
        monkeypatch.setitem(sys.modules, "transformers", None)
    vocabulary = {"<unk>": 0, "\u2581hello": 1, "hello": 2, "\u2581world": 3, "\u2581": 4}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    loaded = load_tokenizer(tmp_path, 8)
    assert [loaded.bytes_of(token) for token in (1, 2, 3, 4)] == [b" hello", b"hello", b" world", b" "]
    assert b"".join(map(loaded.bytes_of, [2, 3, 1])) == loaded.decode([2, 3, 1]).encode()

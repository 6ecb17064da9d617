"""Text becomes tokens, with the tokenizer beside them; from two files to a chatting model in four commands."""

import errno
import json
import os
import sys

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import zoo
from zoo.cli import main
from zoo.text.corpus import documents, tokenize
from zoo.text.tokenizers import load_tokenizer

TEXTS = [f"document {i}, où {'x' * (i % 7)}\n" for i in range(300)]


def write_tokenizer(folder):
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))


def split_at(tokens, end):
    return [document.tolist() for document in np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]]


def test_documents_keep_their_text_and_end(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text(TEXTS[3])
    (tmp_path / "more" / "c.md").write_text("# one document\n")
    made = tokenize([tmp_path / "a.jsonl", tmp_path / "more"], tmp_path / "data", tokenizer=tmp_path, held_out=0.2)
    assert yaml.safe_load((tmp_path / "data" / "data.yaml").read_text()) == made._asdict()
    assert (made.vocab, made.end, made.documents) == (257, 256, 302)
    tokenizer, found = load_tokenizer(tmp_path / "data", 257), {}
    for split in ("train", "test"):
        tokens = np.load(tmp_path / "data" / f"{split}.npy")
        assert (tokens.dtype, len(tokens)) == (np.uint16, getattr(made, split))
        found[split] = [tokenizer.decode(document[:-1]) for document in split_at(tokens, 256)]
    assert sorted(found["train"] + found["test"]) == sorted([*TEXTS, TEXTS[3], "# one document\n"])
    assert not set(found["train"]) & set(found["test"])
    assert 0.1 < len(found["test"]) / 302 < 0.3


def test_dtypes_follow_the_vocabulary(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    made = tokenize([tmp_path / "a.jsonl"], tmp_path / "bytes", field="body", held_out=0.5)
    assert (made.vocab, made.end, np.load(tmp_path / "bytes" / "test.npy").dtype) == (256, 0, np.uint8)
    assert load_tokenizer(tmp_path / "bytes", 256).stop == (0,)
    (tmp_path / "large").mkdir()
    words = Tokenizer(models.WordLevel({**{f"w{i}": i for i in range(66_000)}, "<|end|>": 66_000}, unk_token="w0"))
    words.save(str(tmp_path / "large" / "tokenizer.json"))
    (tmp_path / "large" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )
    tokenize([tmp_path / "a.jsonl"], tmp_path / "wide", tokenizer=tmp_path / "large", field="body", held_out=0.5)
    assert np.load(tmp_path / "wide" / "train.npy").dtype == np.uint32


def test_bad_input_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("one")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(zoo.ZooError, match=r"d\.jsonl: line 2: not JSON: "):
        tokenize([tmp_path / "d.jsonl"], tmp_path / "out")
    with pytest.raises(zoo.ZooError, match=r"holds no tokenizer, such as tokenizer\.json"):
        tokenize([tmp_path / "c.txt"], tmp_path / "out", tokenizer=tmp_path)
    for file, message in (
        ("a", "line 2: no text under 'text'"),
        ("b", "cannot be read as text"),
        ("c", "1 document; want at least 2"),
    ):
        source = tmp_path / (f"{file}.jsonl" if file == "a" else f"{file}.txt")
        with pytest.raises(zoo.ZooError, match=message):
            tokenize([source], tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.extended
def test_a_split_of_a_dataset_is_read_by_its_name(tmp_path, monkeypatch):
    """A folder of that name takes precedence over the hub, also in `datasets`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "me" / "notes").mkdir(parents=True)
    for split, texts in (("train", TEXTS[:200]), ("validation", TEXTS[200:])):
        lines = [json.dumps({"body": text, "number": i}) + "\n" for i, text in enumerate(texts)]
        (tmp_path / "me" / "notes" / f"{split}.jsonl").write_text("".join(lines))

    def run(address, *options):
        return CliRunner().invoke(main, ["tokenize", address, "--held-out", "0.2", *options])

    done = run("hf://datasets/me/notes", "--split", "validation", "--field", "body", "--out", "data")
    assert done.exit_code == 0, done.output
    tokenize([tmp_path / "me" / "notes" / "validation.jsonl"], tmp_path / "same", field="body", held_out=0.2)
    for name in ("train.npy", "test.npy", "data.yaml"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    for address, options, message in (
        ("hf://datasets/me/notes", ["--field", "bodies"], "no column 'bodies'; allowed: body, number"),
        ("hf://datasets/me/notes", ["--field", "number"], "row 1: no text under 'number'"),
        ("hf://datasets/me/notes", ["--split", "test"], 'cannot be loaded: Unknown split "test"'),
    ):
        said = run(address, *options, "--out", "refused")
        assert said.exit_code == 2
        assert said.stderr.startswith(f"Error: {address}: {message}")
        assert said.stderr.count("\n") == 1
        assert not (tmp_path / "refused").exists()


def test_a_dataset_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for address, message in (
        ("hf://datasets/notes", "want hf://datasets/OWNER/NAME, with /SUBSET and @REVISION if needed"),
        ("hf://datasets/me/notes/small@v1", "needs pip install datasets"),
    ):
        said = CliRunner().invoke(main, ["tokenize", address, "--out", str(tmp_path / "data")])
        assert said.stderr == f"Error: {address}: {message}\n"
    said = CliRunner().invoke(main, ["tokenize", "hf://me/notes", "--out", str(tmp_path / "data")])
    assert "'hf://me/notes': want hf://datasets/OWNER/NAME, or a path" in said.stderr


def test_from_two_text_files_to_a_chatting_model_in_four_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name + text * 4}) + "\n" for text in TEXTS))
    (tmp_path / "run.yaml").write_text(
        "model: gdn4-sleep2-slide16\noverrides: {layers: attn gdn, d_model: 16, d_ff: 16, vocab_size: 256}\nsteps: 2\nbatch_size: 2\n"
        "task: {name: text, train: data/train.npy, test: data/test.npy, vocab: 256, length: 32, width: 16}\neval_sequences: 4\n"
    )
    for command in (
        ["tokenize", "a.jsonl", "b.jsonl", "--out", "data", "--held-out", "0.1"],
        ["train", "run.yaml", "--out", "run"],
        ["eval", "run", "--sequences", "4"],
        ["chat", "run", "--tokens", "4", "--seed", "0"],
    ):
        result = CliRunner().invoke(main, command, input="hi\n")
        assert result.exit_code == 0, result.output
    assert load_tokenizer(tmp_path / "run", 256).stop == (0,)  # as in the data


def test_an_output_within_a_source_is_not_a_document(tmp_path):
    """Nor is what a killed process left there."""
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"document {n}")
    (tmp_path / ".old.zoo-unfinished-0123abcd").mkdir()
    (tmp_path / ".old.zoo-unfinished-0123abcd/train.raw").write_text("left")
    assert tokenize([tmp_path], tmp_path / "out", held_out=0.5).documents == 30


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "there/inside").mkdir(parents=True)
    for n in range(30):
        (tmp_path / f"there/inside/{n}.txt").write_text(f"document {n}")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "there")
    (tmp_path / "there/loop").symlink_to(tmp_path / "there")
    assert tokenize([tmp_path / "here"], tmp_path / "out", held_out=0.5).documents == 30


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "in/closed").mkdir(parents=True)
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(zoo.ZooError, match=r"/in/closed: cannot be read: Permission denied$"):
        tokenize([tmp_path / "in"], tmp_path / "out")


def test_a_byte_order_mark_is_no_text_and_line_ends_are(tmp_path):
    texts = ["a\r\nb\rc\n", "other"]
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbf" + texts[0].encode())
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps({"text": text}) + "\r\n" for text in texts).encode())
    assert list(documents([tmp_path / "plain.txt", tmp_path / "rows.jsonl"], "text")) == [texts[0], *texts]


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 70_000}))
    (tmp_path / "in.txt").write_text("a b")
    with pytest.raises(zoo.ZooError, match=r"tokenizer: the end token is 70000; the tokenizer has \d+ tokens$"):
        tokenize([tmp_path / "in.txt"], tmp_path / "out", tokenizer=folder)

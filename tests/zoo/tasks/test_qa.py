"""Questions of one's own about contexts that are evicted."""

import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import zoo
from zoo.checkpoints.companions import read_companions
from zoo.tasks import new_task
from zoo.text.tokenizers import ByteTokenizer, load_tokenizer
from zoo.training.config import TrainConfig
from zoo.training.loop import train
from zoo.training.prepare import prepare

NAMES = ["Ann", "Bob", "Cid", "Dan"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of questions about who has which letter."""
    folder, dice = tmp_path_factory.mktemp("qa"), random.Random(0)
    for name, count in (("train", 4000), ("test", 200)):
        lines = []
        for _ in range(count):
            who = dice.sample(NAMES, 2)
            have = [dice.choice("abcdefgh") for _ in who]
            asked = dice.randrange(2)
            context = " ".join(f"{w}={h}." for w, h in zip(who, have, strict=True))
            lines.append(json.dumps({"context": context, "question": f"{who[asked]}?", "answer": have[asked]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def fields(folder, **more):
    return {"name": "qa", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "width": 32, **more}


def test_the_context_is_slept_on_and_the_answer_carries_the_loss(rows):
    task, text = new_task(fields(rows, windows=2)), ByteTokenizer()
    ids, mask, level = task.batch(0, 3, 5, "test")
    lines = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    for n, row in enumerate(lines[3:8]):
        assert text.decode(ids[n, :64]).lstrip("\0") == row["context"]
        question = text.chat([{"role": "user", "content": row["question"]}])
        end = 64 + len(question)
        assert ids[n, 64:end].tolist() == question
        assert ids[n][mask[n]].tolist() == [*row["answer"].encode(), 0]
        assert np.flatnonzero(mask[n]).tolist() == [end, end + 1]
        assert set(level[n][mask[n]]) == {1}
    first, again = task.batch(1, 2, 8), task.batch(1, 2, 8)
    assert np.array_equal(first.ids, again.ids)
    assert not np.array_equal(first.ids, task.batch(1, 3, 8).ids)
    answers = [row["answer"] for row in lines]
    assert task.chance() == pytest.approx((max(map(answers.count, answers)) + 200) / 400)  # the end is always right


def test_damaged_rows_are_refused(rows, tmp_path):
    good = rows / "test.jsonl"
    for line, message in (
        ('{"context": "a"}', "line 1: want an object with the texts context, question and answer; 'question' is missing"),
        ('{"context": "a", "question": "b", "answer": ""}', "line 1: answer: empty; want a text"),
        ('{"context": "a", "question": "b", "answer": 5}', "line 1: answer: 5; want a text"),
        ("[", "line 1: not JSON"),
        ("[" * 100_000, "line 1: want an object"),
        ("\ud800", "bad.jsonl: cannot be read: 'utf-8' codec"),
        (json.dumps({"context": "", "question": "x" * 40, "answer": "y"}), "line 1: question and answer take .* tokens; width: 32"),
        ("", "no rows"),
    ):
        (tmp_path / "bad.jsonl").write_text(line + "\n", errors="surrogatepass")
        with pytest.raises(zoo.ZooError, match=message):
            new_task({**fields(rows), "train": str(tmp_path / "bad.jsonl"), "test": str(good)}).batch(0, 0, 2)
    with pytest.raises(zoo.ZooError, match="is also the file to train on"):
        new_task({**fields(rows), "test": fields(rows)["train"]})
    with pytest.raises(zoo.ZooError, match=r"train: nowhere\.jsonl: No such file"):
        new_task({**fields(rows), "train": "nowhere.jsonl"})


def test_the_vocabulary_is_that_of_the_tokenizer(rows, tmp_path):
    words = Tokenizer(models.WordLevel({**{f"w{i}": i for i in range(300)}, "<|end|>": 300}, unk_token="w0"))
    words.save(str(tmp_path / "tokenizer.json"))
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fast))
    task = new_task({**fields(rows), "tokenizer": str(tmp_path)})
    assert (task.vocab_size, new_task(fields(rows)).vocab_size) == (301, 256)
    assert 300 in task.batch(0, 0, 2).ids  # the end of an answer


def test_a_long_context_loses_its_beginning(rows, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a" * 40 + "b" * 30, "question": "x", "answer": "y"}) + "\n")
    task = new_task({**fields(rows, windows=2), "test": str(tmp_path / "long.jsonl")})
    with pytest.warns(UserWarning, match="1 of 1 context cut at the beginning: more than 64 tokens"):
        ids = task.batch(0, 0, 1, "test").ids
    assert bytes(ids[0, :64].tolist()) == b"a" * 34 + b"b" * 30


CONFIG = {
    "model": "gdn4-sleep2-hard32",
    "overrides": {
        "d_model": 64, "d_ff": 128, "layers": "(attn gdn)*2", "learned_positions": "asleep", "inject": True, "loop_norm": True,
        "blocks": {
            "attn": {"heads": 4, "rotary": 0, "qk_norm": "plain"},
            "gdn": {"heads": 2, "expand_v": 1, "conv_init": "identity", "decay_init": 1, "gate": False},
        },
    },
    "batch_size": 64, "lr": 3e-3, "warmup": 0.08,
}  # fmt: skip


@pytest.mark.parametrize("steps", [2, pytest.param(300, marks=pytest.mark.extended)])
def test_a_model_answers_about_evicted_context(rows, tmp_path, steps):
    results = train(TrainConfig(task=fields(rows), steps=steps, **CONFIG), tmp_path / "run")
    assert results["answers"] == 400  # of 200 questions, each of which is evaluated once
    assert load_tokenizer(tmp_path / "run", 256).stop == (0,)
    if steps > 2:
        assert results["first"] > 0.95


def test_the_tokenizer_is_that_of_the_model(rows, tmp_path):
    """A model with a tokenizer is not trained on bytes, nor on the tokens of another vocabulary; other files of a folder may differ."""
    for name, letters in (("mine", "abc"), ("same", "abc"), ("other", "bca")):
        words = models.WordLevel({letter: n for n, letter in enumerate(letters)}, "a")
        (tmp_path / name).mkdir()
        Tokenizer(words).save(str(tmp_path / name / "tokenizer.json"), pretty=name == "same")
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    model = zoo.create("gdn4-sleep2-hard32", layers="attn gdn", d_model=16, d_ff=16, vocab_size=3)
    model.companions = read_companions(tmp_path / "mine")
    zoo.save(model, tmp_path / "model")

    def prepared(**more):
        return prepare(TrainConfig(model=str(tmp_path / "model"), task={**fields(rows), **more}, steps=1), torch.device("cpu"))

    prepared(tokenizer=str(tmp_path / "same"))
    with pytest.raises(zoo.ZooError, match=r"task.tokenizer: the tokenizer is not that of .*model; want the same vocabulary"):
        prepared(tokenizer=str(tmp_path / "other"))
    with pytest.raises(zoo.ZooError, match=r"task.tokenizer: none, so the task reads bytes, but .*model has a tokenizer"):
        prepared(vocab=3)
    text = {"name": "text", "vocab": 3, "length": 32, "width": 32}
    for folder in (tmp_path / name for name in ("same", "other", ".")):
        for split in ("train", "test"):
            np.save(folder / f"{split}.npy", np.zeros(32, np.uint8))
            text[split] = str(folder / f"{split}.npy")
        config = TrainConfig(model=str(tmp_path / "model"), task=text, steps=1)
        if folder.name == "other":
            with pytest.raises(zoo.ZooError, match=r"task.train: the tokenizer is not that of .*model; want the same vocabulary"):
                prepare(config, torch.device("cpu"))
        else:  # tokens without a tokenizer beside them may be the model's
            prepare(config, torch.device("cpu"))

"""`zoo eval`: figures against plain computations, runs that have not finished, held-out files, and the comparison."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy

import zoo
from zoo.cli import main
from zoo.config import resolve
from zoo.tasks import new_task
from zoo.training.evaluate import evaluate
from zoo.training.held_out import held_out_task
from zoo.training.loop import train

from .tiny import TINY, tiny

TEXT = "Sleep is a state of reduced activity. Ünïcode too: 睡眠. " * 12
SIZE = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 256}


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["eval", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def results(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of bytes that sleeps, one with weights of its own as its parent, a text, and questions."""
    base = tmp_path_factory.mktemp("evaluate")
    zoo.save(zoo.create("gdn4-sleep2-hard32", **SIZE), base / "model")
    zoo.save(zoo.create("gdn4", **{**SIZE, "layers": "attn"}, seed=1), base / "parent")
    (base / "held.txt").write_text(TEXT)
    rows = [{"context": f"a={n}", "question": "a?", "answer": str(n)} for n in range(6)]
    (base / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (base / "empty.jsonl").write_text("\n")
    return base


@torch.no_grad()
def losses(model, ids, *, window=None, loops=1):
    """Loss of every token but the first, window by window: a wake pass, then a sleep on the same tokens; loops=0: every window alone."""
    state, found, before = None, [], None
    for piece in ids.split(window or ids.shape[1], dim=1):
        logits = model(piece, state).logits
        joined = logits if before is None else torch.cat([before, logits], 1)
        found.append(cross_entropy(joined[0, :-1], piece[0, -(joined.shape[1] - 1) :], reduction="none"))
        before = logits[:, -1:]
        state = model.consolidate(piece, state, loops=loops) if window and loops else None
    return found


def test_a_text_file_by_hand(folders):
    """Consecutive sequences; bits per byte, loss by window and perplexity from single passes."""
    found = results(folders / "model", "--data", folders / "held.txt", "--length", 96, "--sequences", 3)
    model = zoo.load(folders / "model")
    ids = torch.tensor(list(TEXT.encode()))[: 3 * 96].view(3, 96)
    by_hand = [losses(model, row[None], window=32, loops=2) for row in ids]
    windows = [torch.cat([row[n] for row in by_hand]) for n in range(3)]
    for n, window in enumerate(windows, 1):
        assert found["loss_by_window"][str(n)] == pytest.approx(window.mean().item(), abs=1e-4)
    total = torch.cat(windows)
    assert found["answers"] == len(total) == 3 * 95
    assert found["loss"] == pytest.approx(total.mean().item(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total.mean().item()), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total.mean().item() / math.log(2), rel=1e-5)  # a token is a byte
    assert (found["loops"], found["trained_loops"]) == (2, 2)


def test_the_end_of_a_text_is_a_sequence_too(folders, tmp_path):
    """Each token but the first of each sequence is predicted, also in a sequence that is shorter than the others."""
    model = zoo.load(folders / "model")
    for size, sequences in ((300, 5), (257, 4)):  # a single token at the end has nothing before it
        (tmp_path / "text.txt").write_text(TEXT.encode()[:size].decode())
        found = results(folders / "model", "--data", tmp_path / "text.txt", "--length", 64)
        rows = torch.tensor(list(TEXT.encode()[:size])).split(64)[:sequences]
        by_hand = torch.cat([torch.cat(losses(model, row[None], window=32, loops=2)) for row in rows])
        assert found["answers"] == len(by_hand)
        assert found["loss"] == pytest.approx(by_hand.mean().item(), abs=1e-5)
        assert found["bits_per_byte"] == pytest.approx(by_hand.mean().item() / math.log(2), rel=1e-5)


def test_bytes_are_those_of_the_decoded_text(folders, tmp_path):
    """Tokens of several bytes: the same loss per token is fewer bits per byte."""
    shutil.copytree(folders / "model", tmp_path / "bpe")
    letters = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(
        models.BPE(
            {**{k: i for k, i in letters.items() if i < 250}, "sl": 250, "ee": 251, "slee": 252}, [("s", "l"), ("e", "e"), ("sl", "ee")]
        )
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(tmp_path / "bpe" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("sleep slee sleep " * 8)
    found = results(tmp_path / "bpe", "--data", tmp_path / "text.txt", "--length", 40, "--sequences", 1)
    ids = made.encode("sleep slee sleep " * 8).ids[:40]
    size = len(made.decode(ids).encode()) - len(made.decode(ids[:1]).encode())
    assert size > 60
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 39 / math.log(2) / size, rel=1e-5)


def test_other_passes_are_named_and_differ(folders):
    data = ["--data", folders / "held.txt", "--sequences", 2]
    assert "N = 2\n" in run(folders / "model", *data).stdout
    assert "N = 3 (trained with N = 2)" in run(folders / "model", *data, "--loops", 3).stdout
    assert results(folders / "model", *data)["loss"] != results(folders / "model", *data, "--loops", 3)["loss"]
    assert results(folders / "model", *data, "--loops", 3)["loss"] == results(folders / "model", "loops=3", *data)["loss"]
    narrow = results(folders / "model", *data, "--dtype", "bfloat16")["loss"]
    assert 0 < abs(narrow - results(folders / "model", *data)["loss"]) < 0.1


def test_questions_are_asked_after_their_context_is_evicted(folders):
    found = results(folders / "model", "--data", folders / "asked.jsonl")
    task = new_task({"name": "qa", "train": str(folders / "held.txt"), "test": str(folders / "asked.jsonl"), "width": 32})
    assert found["loss"] == pytest.approx(evaluate(zoo.load(folders / "model"), task, 6)["loss"], abs=1e-6)
    assert found["answers"] == 12
    assert found["loss_by_window"].keys() == {"2"}


def test_held_out_tokens_of_a_run_are_counted_once(tmp_path):
    """As if each sequence was given by hand: every one once, none twice, and no more than there are."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", draw.integers(0, 11, 331).astype(np.uint8))
    files = {split: str(tmp_path / f"{split}.npy") for split in ("train", "test")}
    task = {"name": "text", **files, "vocab": 11, "length": 12, "width": 6}
    train(tiny(task=task, overrides={**TINY["overrides"], "vocab_size": 11, "sleep_on": "every"}), tmp_path / "run")
    found = results(tmp_path / "run", "--sequences", 50)
    assert found["answers"] == 27 * 11
    model = zoo.load(tmp_path / "run")
    rows = torch.from_numpy(np.load(tmp_path / "test.npy")[: 27 * 12].astype(np.int64)).view(27, 12)
    assert found["loss"] == pytest.approx(model.loss(rows, torch.ones(27, 12)).item(), abs=1e-5)
    assert results(tmp_path / "run", "--sequences", 5)["answers"] == 5 * 11
    assert f"{27 * 11} predicted tokens" in run(tmp_path / "run", "--sequences", 50).stdout


def test_runs_that_have_not_finished_and_single_checkpoints(tmp_path):
    train(tiny(steps=3, checkpoint_every=1, keep=3, seed=4), tmp_path / "run")
    finished = results(tmp_path / "run", "--sequences", 8)
    assert finished["step"] is None
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: results(tmp_path / "run")[name] for name in stored} == stored  # the sequences and the seed of the run
    first = results(tmp_path / "run" / "checkpoints" / "00000001", "--sequences", 8)
    assert first["step"] == 1
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000003")
    newest = results(tmp_path / "run", "--sequences", 8)
    assert newest["step"] == 2
    assert "00000002 (step 2 of 3)" in run(tmp_path / "run", "--sequences", 8).stdout
    task = new_task(TINY["task"])
    for found, step in ((first, 1), (newest, 2)):
        if step == 2:
            model = zoo.load(tmp_path / "run" / "checkpoints" / f"{step:08d}")
            assert found["loss"] == evaluate(model, task, 8, seed=4)["loss"]
    assert len({first["loss"], newest["loss"], finished["loss"]}) == 3
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "not written a checkpoint yet" in run(tmp_path / "run", status=2).stderr


def test_the_comparison_is_each_model_by_hand(folders):
    """A parent without fast weights: inserted blocks change nothing, and full attention is one pass over everything."""
    data = ["--data", folders / "held.txt", "--length", 80, "--sequences", 2]
    arguments = [folders / "model", *data, "--compare", "--parent", folders / "parent"]
    found = results(*arguments)
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert list(arms) == ["parent, full attention", "parent, sliding window", "parent, hard eviction", "this model, N = 1", "this model"]
    ids = torch.tensor(list(TEXT.encode()))[:160].view(2, 80)
    parent, model = zoo.load(folders / "parent"), zoo.load(folders / "model")
    expected = {
        "parent, full attention": [torch.cat(losses(parent, row[None])) for row in ids],
        "parent, hard eviction": [torch.cat(losses(parent, row[None], window=32, loops=0)) for row in ids],
        "this model, N = 1": [torch.cat(losses(model, row[None], window=32)) for row in ids],
        "this model": [torch.cat(losses(model, row[None], window=32, loops=2)) for row in ids],
    }
    for name, rows in expected.items():
        assert arms[name]["loss"] == pytest.approx(torch.cat(rows).mean().item(), abs=1e-5), name
    assert (
        arms["parent, full attention"]["state_bytes"]
        == zoo.Session(parent).stats().cache_bytes + 80 * zoo.describe(parent).kv_bytes_per_token
    )
    assert arms["parent, sliding window"]["state_bytes"] < arms["parent, full attention"]["state_bytes"]
    assert [arm["loops"] for arm in found["arms"]] == [1, 1, 1, 1, 2]
    assert all(arm["tokens_per_second"] > 0 for arm in found["arms"])
    shown = run(*arguments).stdout
    assert all(f"{arm['loss']:.4f}" in shown for arm in found["arms"])


def test_questions_keep_the_layout_of_a_run_without_a_window(folders, tmp_path):
    overrides = {**SIZE, "evict": "none", "window": None}
    zoo.save(zoo.create("gdn4", **overrides), tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(json.dumps({"context": "b=1", "question": "b?", "answer": "1"}))
    asked = {"name": "qa", "train": str(tmp_path / "train.jsonl"), "test": str(folders / "asked.jsonl"), "width": 24}
    trained = tiny(model="gdn4", overrides=overrides, task=asked)
    held_out = held_out_task(folders / "asked.jsonl", tmp_path / "model", resolve(tmp_path / "model" / "zoo.yaml"), trained, None)
    want = new_task(asked).batch(0, 0, 6, "test")
    assert all((found == expected).all() for found, expected in zip(held_out.batch(0, 0, 6, "test"), want, strict=True))


def test_the_comparison_counts_the_tokens_that_are_there(folders, tmp_path, monkeypatch):
    """Conversations differ in length."""
    rows = [{"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}]} for n in (5, 40, 12)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("zoo.training.compare.time.perf_counter", iter(range(100)).__next__)  # every evaluation takes a second
    found = results(folders / "model", "--data", tmp_path / "talk.jsonl", "--compare", "--parent", folders / "parent")
    task = held_out_task(tmp_path / "talk.jsonl", folders / "model", zoo.load(folders / "model").config, None, None)
    lengths = [task.batch(0, n, 1, "test").ids.shape[1] for n in range(3)]
    assert len(set(lengths)) == 3
    arm = found["arms"][0]
    assert arm["name"] == "parent, full attention"
    assert arm["tokens_per_second"] == sum(lengths)
    model = zoo.load(folders / "parent")
    assert arm["state_bytes"] == zoo.Session(model).stats().cache_bytes + max(lengths) * zoo.describe(model).kv_bytes_per_token


def test_a_parent_that_is_gone_is_named(folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "parent")
    for split, order in (("train", 1), ("test", -1)):
        np.save(tmp_path / f"{split}.npy", np.frombuffer(TEXT.encode(), np.uint8)[::order])
    files = {split: str(tmp_path / f"{split}.npy") for split in ("train", "test")}
    task = {"name": "text", **files, "vocab": 256, "length": 64, "width": 32}
    train(tiny(model=str(tmp_path / "parent"), overrides={"sleep_on": "every"}, task=task), tmp_path / "run")
    shutil.rmtree(tmp_path / "parent")
    assert f"parent: {tmp_path / 'parent'}, where the run began, is gone" in run(tmp_path / "run", "--compare", status=2).output
    run(tmp_path / "run", "--compare", "--parent", folders / "model", "--sequences", 2)


def test_an_arm_that_cannot_run_says_why(folders, tmp_path):
    zoo.save(zoo.create("gdn4-sleep2-hard32", **SIZE, learned_positions=True), tmp_path / "learned")
    arguments = [tmp_path / "learned", "--data", folders / "held.txt", "--sequences", 1, "--compare"]
    refused = [arm["name"] for arm in results(*arguments)["arms"] if "refused" in arm]
    assert refused == ["own weights, full attention", "own weights, sliding window"]
    shown = run(*arguments).stdout
    assert "own weights, full attention: " in shown
    assert "no parent is known" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/model"], "not a training run, whose task names held-out data; give --data"),
        (["{folder}/model", "--data", "{folder}/held.txt", "--seed", "1"], "--seed: 1: needs no --data"),
        (["{folder}/model", "--data", "{folder}/held.txt", "--parent", "x"], "--parent: x: needs --compare"),
        (["{folder}/parent", "--data", "{folder}/held.txt", "--loops", "2"], "--loops: 2; gdn4 never sleeps (evict: none)"),
        (["{folder}/parent", "--data", "{folder}/held.txt", "--compare"], "--compare: gdn4 never sleeps"),
        (["{folder}/model", "--data", "{folder}/asked.jsonl", "--length", "9"], "--length: 9; "),
        (["{folder}/model", "--data", "{folder}/model/model.safetensors"], "cannot be read as text"),
        (["{folder}/model", "--data", "{folder}/empty.jsonl"], "--data: {folder}/empty.jsonl: no rows"),
    ],
)
def test_bad_options_are_one_line(folders, arguments, message):
    error = run(*(a.format(folder=folders) for a in arguments), status=2).stderr
    assert message.format(folder=folders) in error
    assert error.count("\n") == 1


def test_tokens_outside_the_vocabulary_are_refused(folders, tmp_path):
    np.save(tmp_path / "ids.npy", np.full(40, 300, np.uint16))
    assert "token 300; the model has 256" in run(folders / "model", "--data", tmp_path / "ids.npy", status=2).stderr

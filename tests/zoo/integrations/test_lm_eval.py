"""lm-evaluation-harness on a model that sleeps: `zoo lm-eval` on three small local tasks. Needs `pip install '.[integrations]'`."""

import contextlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import zoo
from zoo.cli import main

pytestmark = pytest.mark.extended

WINDOW = 32
TEXT = "".join(f"Entry {n}: the number {n} comes after {n - 1}, and {n * n} is its square.\n" for n in range(1, 60))
LENGTH = 600
PAGE = Path(__file__).parents[3] / "docs/integrations.md"
CHOICES = [{"q": f"{n} plus {n} is", "choices": [f" {n + n}", f" {n}", f" {n} more than {n * n}"], "gold": 0} for n in range(3, 19)]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "gold",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    },
    "tiny_generation": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}, "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, the text, and three tasks that need no network."""
    home = tmp_path_factory.mktemp("lm_eval")
    size = {"layers": "attn gdn", "d_model": 32, "d_ff": 32, "vocab_size": 256, "sleep_on": "every"}
    model = zoo.create(f"gdn4-sleep2-hard{WINDOW}", **size, seed=1)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor(list(TEXT.encode()))
    for step in range(40):
        start = torch.arange(8) * 300 + 7 * step
        batch = torch.stack([ids[at : at + 128] for at in start])
        loss = model.loss(batch, torch.ones_like(batch, dtype=torch.bool))
        loss.backward()
        adam.step()
        adam.zero_grad()
    assert loss.item() < 3
    zoo.save(model, home / "model")
    (home / "text.txt").write_text(TEXT)
    pages = [{"page": TEXT[at : at + LENGTH]} for at in range(0, len(TEXT), LENGTH)]
    for name, rows in {"tiny_choice": CHOICES, "tiny_generation": CHOICES, "tiny_rolling": pages}.items():
        data = home / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (home / "tasks").mkdir(exist_ok=True)
        (home / f"tasks/{name}.yaml").write_text(json.dumps(task | TASKS[name]))
    return home


def command(folder, line):
    """Run a command in the folder of the model; returns the result, and the metrics of each task."""
    for file in folder.glob("out*.json"):
        file.unlink()
    with contextlib.chdir(folder):
        result = CliRunner().invoke(main, [*line.removeprefix("zoo ").split(), "--output_path", "out.json"])
    written = list(folder.glob("out*.json"))
    return result, json.loads(written[0].read_text())["results"] if written else {}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def test_the_command_of_the_page_evaluates_local_tasks(folder):
    """And its bits per byte are those of `zoo eval` on the same text."""
    line = re.search(r"^    (zoo lm-eval run .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1]
    result, metrics = command(folder, line.replace("tiny_choice,", "tiny_choice,tiny_generation,"))
    assert result.exit_code == 0, result.output
    assert sorted(metrics) == ["tiny_choice", "tiny_generation", "tiny_rolling"]
    line = f"eval {folder / 'model'} --data {folder / 'text.txt'} --length {LENGTH} --loops 4 --json"
    ours = json.loads(CliRunner().invoke(main, line.split()).stdout)
    assert metrics["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=0.01)
    assert ours["bits_per_byte"] < 4.5


def lm(folder, **options):
    from zoo.integrations.lm_eval import ZooLM

    return ZooLM(str(folder / "model"), **options)


def requests(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


PAIRS = requests(*((one["q"] * (1 + n % 3), choice) for n, one in enumerate(CHOICES[:6]) for choice in one["choices"]))
PAGES = requests(*((TEXT[at : at + 40 + at // 8],) for at in range(0, 1200, 150)))


def by_hand(model, context, answer, when="full", sleep=False):
    """The log-probability of an answer, token by token."""
    session, total = zoo.Session(model, when=when), 0.0
    if sleep:
        session.read(torch.tensor([context[:-1]]))
        session.sleep()
        context = context[-1:]
    logits = session.feed(torch.tensor([context]))[0, -1]
    for token in answer:
        total += logits.log_softmax(-1)[token].item()
        logits = session.feed(torch.tensor([[token]]))[0, -1]
    return total


@pytest.mark.parametrize(
    "options",
    [{}, {"loops": 4}, {"when": "interval(10)"}, {"sleep_before_answer": True}, {"evict": "sliding"}],
    ids=["plain", "loops", "when", "sleep", "sliding"],
)
def test_batches_agree_with_streams_read_token_by_token(folder, options):
    one, many = (lm(folder, batch_size=size, **options) for size in (1, "auto"))
    alone, together = (found.loglikelihood(PAIRS, disable_tqdm=True) for found in (one, many))
    assert [greedy for _, greedy in alone] == [greedy for _, greedy in together]
    assert [score for score, _ in alone] == pytest.approx([score for score, _ in together], abs=1e-5)
    fields = {name: value for name, value in options.items() if name in ("loops", "evict")}
    model = zoo.load(folder / "model", **fields)
    how = {"when": options.get("when", "full"), "sleep": options.get("sleep_before_answer", False)}
    context, answer = (list(text.encode()) for text in PAIRS[5].args)
    assert together[5][0] == pytest.approx(by_hand(model, context, answer, **how), abs=1e-4)
    rolled = many.loglikelihood_rolling(PAGES, disable_tqdm=True)
    assert min(map(abs, rolled)) > 10  # so that a difference of 1e-4 is one of less than 1e-5 in relative terms
    assert one.loglikelihood_rolling(PAGES, disable_tqdm=True) == pytest.approx(rolled, abs=1e-4)
    assert rolled[7] == pytest.approx(by_hand(model, [0], list(PAGES[7].args[0].encode()), when=how["when"]), abs=1e-3)
    asked = requests(*((one["q"], {"until": ["."], "max_gen_toks": 20}) for one in CHOICES[:8]))
    assert one.generate_until(asked) == many.generate_until(asked)


def test_settings_of_sleep_change_the_scores(folder):
    """On pages of several windows."""
    plain = lm(folder).loglikelihood_rolling(PAGES[4:])
    assert abs(lm(folder, loops=1).loglikelihood_rolling(PAGES[4:])[0] - lm(folder, loops=4).loglikelihood_rolling(PAGES[4:])[0]) > 1e-3
    assert abs(lm(folder, when="interval(10)").loglikelihood_rolling(PAGES[4:])[0] - plain[0]) > 1e-3
    asleep, awake = (lm(folder, sleep_before_answer=sleep).loglikelihood(PAIRS[:6]) for sleep in (True, False))
    assert max(abs(a[0] - b[0]) for a, b in zip(asleep, awake, strict=True)) > 1e-3


def test_generation_ends_at_stop_sequences_and_follows_the_session(folder):
    model = zoo.load(folder / "model")
    prompts = ["Entry 12: the number", "Entry 7", "Entry 25: the number 25 comes after 24, and"]
    expected = []
    for prompt in prompts:
        tokens = zoo.Session(model).generate(torch.tensor([list(prompt.encode())]), 30)
        expected.append(bytes(int(token) for token in tokens).decode(errors="replace").split("e")[0])
    found = lm(folder, batch_size=8).generate_until(requests(*((p, {"until": ["e"], "max_gen_toks": 30}) for p in prompts)))
    assert found == expected
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 5, "seed": 1, "max_gen_toks": 10}
    first, again = (lm(folder).generate_until(requests((prompts[0], sampled))) for _ in range(2))
    assert first == again
    assert first != lm(folder).generate_until(requests((prompts[0], sampled | {"seed": 2})))
    with pytest.raises(zoo.ZooError, match="gen_kwargs: beams; allowed: until"):
        lm(folder).generate_until(requests((prompts[0], {"beams": 2})))


def test_a_conversation_is_rendered_by_the_chat_template(folder):
    found = lm(folder)
    assert found.apply_chat_template([{"role": "user", "content": "hi"}]) == "user: hi\nassistant: "
    found.text.templates = {"default": "{{ messages[0].content }}!", "loud": "{{ messages[0].content | upper }}!"}
    assert found.chat_template(True) == "{{ messages[0].content }}!"
    assert found.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"
    found.chat_template("loud")
    assert found.apply_chat_template([{"role": "user", "content": "hi"}]) == "HI!"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("loop=4", "loop: unknown field"),
        ("sleep_before_answer=maybe", "sleep_before_answer: 'maybe'; allowed: True, False"),
        ("when=interval(99)", "interval: 99 tokens; the model's window holds 32"),
        ("evict=none,loops=4", r"loops: 4; .* never sleeps \(evict: none\)"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(folder, more, message):
    result, _ = command(folder, f"lm-eval run --model zoo --model_args pretrained=model,{more} --tasks tiny_choice --include_path tasks")
    assert result.exit_code == 2
    assert re.search(f"^Error: .*{message}", result.output.splitlines()[-1])
    for line, why in {
        "--model_args loops=2 --tasks tiny_choice": "model_args: pretrained is missing; want pretrained=FOLDER",
        "--model_args pretrained=model --tasks nosuchtask": "lm-eval: .*nosuchtask",
    }.items():
        result, _ = command(folder, f"lm-eval run --model zoo {line} --include_path tasks")
        assert result.exit_code == 2
        assert re.search(f"^Error: {why}", result.output.splitlines()[-1])
    with pytest.raises(zoo.ZooError, match="batch_size: 0; want a number of streams"):
        lm(folder, batch_size=0)


def test_bits_per_byte_count_bytes(folder):
    """The rolling score is the log-probability of every byte, the first one after the token that begins a text."""
    found = lm(folder).loglikelihood_rolling(requests(("é",)))[0]
    assert found == pytest.approx(by_hand(zoo.load(folder / "model"), [0], list("é".encode())), abs=1e-5)
    assert math.isfinite(found)


def test_an_empty_page_scores_zero(folder):
    whole = lm(folder).loglikelihood_rolling(requests(("a",)))[0]
    assert lm(folder).loglikelihood_rolling(requests(("",))) == [0.0]
    assert lm(folder, batch_size=2).loglikelihood_rolling(requests(("",), ("a",), ("",))) == pytest.approx([0.0, whole, 0.0], abs=1e-5)

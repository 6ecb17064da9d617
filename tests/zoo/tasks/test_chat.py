"""Conversations of one's own, of several turns."""

import json

import numpy as np
import pytest
import torch

import zoo
from zoo.tasks import new_task
from zoo.text.tokenizers import load_tokenizer
from zoo.training.config import TrainConfig
from zoo.training.evaluate_folder import evaluate_folder
from zoo.training.loop import train

TALKS = [
    [("user", "hi"), ("assistant", "hello"), ("user", "who are you?"), ("assistant", "a model"), ("user", "bye")],
    [("system", "be brief"), ("user", "1+1?"), ("assistant", "2")],
    [("assistant", "ask me"), ("user", "when?"), ("assistant", "now, or in a very long while, if you like")],
]
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '\\x00' }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def lines(talks):
    return "".join(json.dumps({"messages": [{"role": role, "content": said} for role, said in talk]}) + "\n" for talk in talks)


@pytest.fixture
def folder(tmp_path):
    """Conversations, and a tokenizer of bytes with a chat template."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines(TALKS))
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "bytes" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return tmp_path


def task(folder, **more):
    return new_task({"name": "chat", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "width": 16, **more})


def test_answers_are_supervised_with_their_ends(folder):
    ids, mask, level = task(folder).batch(0, 0, 3, "test")
    text = load_tokenizer(None, 256)
    for row, supervised, levels, talk in zip(ids, mask, level, TALKS, strict=True):
        assert text.decode(row[supervised]) == "".join(f"{said}\n" for role, said in talk if role == "assistant")
        until = max(n for n, (role, _) in enumerate(talk) if role == "assistant") + 1
        whole = "".join(f"{role}: {said}\n" for role, said in talk[:until])
        assert text.decode(row[: len(whole)]) == whole
        assert not row[len(whole) :].any()
        assert np.array_equal(levels, (np.arange(len(row)) // 16 + 1) * supervised)
    answers = ids[mask]
    assert task(folder).chance() == max(np.mean(answers == token) for token in answers)


def test_an_answer_of_weight_0_is_only_read(folder):
    for split in ("train", "test"):
        messages = [{"role": "assistant", "content": said, "weight": weight, "refusal": None} for said, weight in (("no", 0), ("yes", 1))]
        (folder / f"{split}.jsonl").write_text(json.dumps({"messages": messages}))
    ((ids,), (mask,), _) = task(folder).batch(0, 0, 1, "test")
    text = load_tokenizer(None, 256)
    assert text.decode(ids) == "assistant: no\nassistant: yes\n"
    assert text.decode(ids[mask]) == "yes\n"


def test_fields_of_a_message_that_the_template_reads(folder):
    template = folder / "bytes" / "chat_template.jinja"
    message = {"role": "assistant", "content": "a", "thoughts": "b"}
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"messages": [message]}))
    with pytest.raises(zoo.ZooError, match=r"messages.0.thoughts: the chat template does not read it"):
        task(folder, tokenizer=str(folder / "bytes")).batch(0, 0, 1)
    template.write_text(TEMPLATE.replace("m.content", "m.thoughts"))
    ((ids,), _, _) = task(folder, tokenizer=str(folder / "bytes")).batch(0, 0, 1)
    assert load_tokenizer(folder / "bytes", 256).decode(ids) == "<assistant>b\0\n"


def test_a_template_ends_the_answers(folder):
    """Before an answer, a sequence is what the server reads; what follows the end of an answer is not supervised."""
    text = load_tokenizer(folder / "bytes", 256)
    ids, mask, _ = task(folder, tokenizer=str(folder / "bytes")).batch(0, 0, 3, "test")
    for row, supervised, talk in zip(ids, mask, TALKS, strict=True):
        messages = [{"role": role, "content": said} for role, said in talk]
        wanted = np.zeros(len(row), bool)
        for n, (role, said) in enumerate(talk):
            if role == "assistant":
                asked = text.chat(messages[:n])
                assert row[: len(asked)].tolist() == asked
                wanted[len(asked) : len(asked) + len(said) + 1] = True
                assert row[len(asked) + len(said)] == 0
        assert np.array_equal(supervised, wanted)


@pytest.mark.parametrize("evict", ["hard", "sliding"])
def test_the_loss_is_that_of_each_conversation_alone(folder, evict):
    model = zoo.create(
        f"gdn4-sleep2-{evict.replace('sliding', 'slide')}16", vocab_size=256, sleep_on="every", d_model=16, dtype=torch.float64
    )
    ids, mask, _ = (torch.from_numpy(x) for x in task(folder).batch(0, 0, 3, "test"))
    losses = []
    for row, supervised in zip(ids, mask, strict=True):
        length = int(supervised.nonzero().max()) + 1
        losses.append(model.answers(row[None, :length], supervised[None, :length]).losses())
    together = model.answers(ids, mask).losses()
    assert sum(map(len, losses)) == len(together)
    assert torch.allclose(together.sum(), torch.cat(losses).sum(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("talk", "template", "message"),
    [
        ([("user", "hi")], None, "line 1: messages: none of the assistant"),
        ([("wizard", "hi")], None, "line 1: messages.0.role: 'wizard'; allowed: system, developer, user, assistant"),
        ([("user", "hi"), ("assistant", "a\nb")], None, r"messages.1: 'a\\nb' has several lines, which needs a chat template"),
        ([("user", "hi"), ("assistant", "a")], "{{ messages[-1].content }}", "messages.1: the chat template changes earlier text"),
        (
            [("user", "hi"), ("assistant", "a")],
            "{% for m in messages %}{{ m.content }};{% endfor %}",
            r"messages.1: the chat template ends it with none of the tokens \(0,\), which end an answer",
        ),
    ],
)
def test_conversations_that_do_not_fit(folder, talk, template, message):
    (folder / "train.jsonl").write_text(lines([talk]))
    if template is not None:
        (folder / "bytes" / "chat_template.jinja").write_text(template)
    with pytest.raises(zoo.ZooError, match=message):
        task(folder, **({} if template is None else {"tokenizer": str(folder / "bytes")})).batch(0, 0, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", "not JSON: "),
        ("{}", "want an object with a list of messages; 'messages' is missing"),
        ("[1]", "want an object with a list of messages"),
        ('{"messages": 3}', "want an object with a list of messages"),
        ('{"messages": [3]}', "messages.0: want an object with role and content"),
        ('{"messages": [{"role": "assistant"}]}', "messages.0: want an object with role and content"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "messages.0.content: want a text, or a list of text parts"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "messages.0.content: empty; want a text"),
        ('{"messages": [{"role": "assistant", "content": [{"type": "text", "text": ""}]}]}', "messages.0.content: empty; want a text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages.0.content: want a text"),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}', "messages.0.tool_calls: calls are not supported"),
        ('{"messages": [], "tools": [{}]}', "tools: conversations with tools are not supported"),
    ],
)
def test_other_lines_are_refused(folder, line, message):
    (folder / "train.jsonl").write_text(line)
    with pytest.raises(zoo.ZooError, match=f"line 1: {message}"):
        task(folder).batch(0, 0, 2)


def test_text_parts_are_joined_and_a_byte_order_mark_is_skipped(folder):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    (folder / "train.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": parts}]}), encoding="utf-8-sig")
    assert bytes(task(folder).batch(0, 0, 1).ids[0].tolist()) == b"assistant: hello\n"


def test_tokenizers_that_do_not_fit(folder):
    with pytest.raises(zoo.ZooError, match="tokenizer: nowhere: no such folder"):
        task(folder, tokenizer="nowhere")
    with pytest.raises(zoo.ZooError, match=r"tokenizer: .*jinja: a file; want its folder"):
        task(folder, tokenizer=str(folder / "bytes" / "chat_template.jinja"))
    (folder / "bytes" / "chat_template.jinja").unlink()
    with pytest.raises(zoo.ZooError, match=r"tokenizer: .*bytes: has no chat template"):
        task(folder, tokenizer=str(folder / "bytes"))


def test_a_long_conversation_loses_its_end(folder):
    with pytest.warns(UserWarning, match=r"3 of 3 conversations take more than length: 30 tokens and lose their end; 1 of them, which"):
        assert len(task(folder, length=30).rows("test")) == 2
    with pytest.raises(zoo.ZooError, match="no conversation has an answer within length: 5 tokens"):
        task(folder, length=5).rows("test")
    with pytest.warns(UserWarning, match="0 of them"):
        ids, mask, _ = task(folder, length=48).batch(0, 2, 1, "test")
    assert bytes(ids[0].tolist()) == b"assistant: ask me\nuser: when?\nassistant: now, or"
    assert mask[0].sum() == len("ask me\n") + len("now, or")


def test_training(folder):
    config = TrainConfig(
        model="gdn4-sleep2-hard16",
        overrides={"d_model": 32, "d_ff": 32, "layers": "attn gdn"},
        task={"name": "chat", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "width": 16},
        steps=30,
        batch_size=4,
        lr=1e-2,
        log_every=1,
        eval_sequences=3,
    )
    losses = []
    train(config, folder / "run", report=lambda line: losses.append(line["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert zoo.load(folder / "run").config.sleep_on == "every"
    assert load_tokenizer(folder / "run", 256).stop == (ord("\n"),)  # an answer is a line


def test_evaluation_on_another_file(folder):
    """Conversations are read as `chat` reads them, and give the loss of the task."""
    fields = {"name": "chat", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "width": 16}
    overrides = {"d_model": 16, "d_ff": 16, "layers": "attn gdn"}
    config = TrainConfig(model="gdn4-sleep2-hard16", overrides=overrides, task=fields, steps=2, batch_size=2, eval_sequences=3)
    results = train(config, folder / "run")
    found = evaluate_folder(folder / "run", {}, data=folder / "test.jsonl")
    assert found["loss"] == pytest.approx(results["loss"], rel=1e-5)

"""Random conversations over HTTP: what a stream holds and says, beside another rendering and a plain session."""

import json
import random
import shutil
from itertools import pairwise

import jinja2
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import zoo
from tests.zoo.serving.local import local, post
from zoo.sessions.sampling import Sampler, Sampling
from zoo.text.tokenizers import load_tokenizer

PLAIN = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# as Qwen's: what an assistant said up to an "e" counts as reasoning, which earlier turns lose
REASONING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('e')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
END = 1  # the token
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "end", "of", "world", "is", "beginning"]


def folder(path, template, merges):
    """Write a model and a tokenizer: one token per byte, or with `merges` tokens that a sampled text splits differently."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<|start|>", "<|end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    model = zoo.create("gdn4-sleep2-hard24", layers="attn gdn", d_model=32, d_ff=16, vocab_size=made.get_vocab_size())
    with torch.no_grad():  # so that what it says depends on how it has slept
        for name, weight in model.named_parameters():
            weight.mul_(3 if name.endswith(("o_proj.weight", "head.weight")) else 1)
    zoo.save(model, path)
    made.save(str(path / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": made.token_to_id("<|end|>")}))
    return zoo.load(path)


ERRORS = [
    ({"bad": 1}, 400),
    ({"max_tokens": 10**6}, 400),
    ({"model": "other"}, 404),
    ({"messages": [{"role": "robot", "content": "hi"}]}, 400),
    ({"messages": []}, 400),
    ({"temperature": 3}, 400),
    ({"n": 2}, 400),
]


class Client:
    """A chat window: it holds the messages, and does to them what users do."""

    def __init__(self, model, path, seed, render):
        self.model, self.random, self.name, self.render = model, random.Random(seed), f"chat-{seed}", render
        self.tokenizer = load_tokenizer(path, model.config.vocab_size)
        self.messages = [{"role": "system", "content": "Answer briefly, please."}] if seed % 2 else []
        self.agreed, self.stream, self.server = False, [], None

    def act(self, server):
        """Do one thing, and compare what the server makes of it."""
        self.server = server
        answered = [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]
        kind = self.random.choice(["turn", "turn", "edit", "again", "cancel", "stop", "error", "append", "sleep", "sleep"])
        if kind == "error":
            wrong, status = self.random.choice(ERRORS)
            body = {"messages": [{"role": "user", "content": "hi"}], "session": self.name, **wrong}
            assert self.server.ask("/v1/chat/completions", body)[0] == status, wrong
        elif kind == "sleep":
            loops = self.random.choice([1, 5])
            assert post(self.server, f"/v1/sessions/{self.name}/sleep", {"loops": loops})[0] == (200 if self.stream else 404)
        if kind in ("error", "sleep"):
            if self.stream and kind == "sleep":
                assert self.about()["window"]["tokens"] == 0
            assert not self.stream or self.server.ask(f"/v1/sessions/{self.name}")[1]["tokens"] == len(self.stream)
            return
        if kind == "edit" and answered:
            del self.messages[self.random.choice(answered) - 1 :]
            self.agreed = False
        if kind == "again" and answered:
            del self.messages[-1]
        else:
            self.messages.append({"role": "user", "content": " ".join(self.random.choices(WORDS, k=self.random.randint(1, 6)))})
        self.ask(kind)

    def ask(self, kind):
        how = {"temperature": self.random.choice([0, 1.0]), "seed": self.random.randint(0, 9)}
        most, prompt = self.random.randint(1, 20), self.render(self.messages)
        body = {"messages": self.messages, "session": self.name, "max_tokens": most, **how}
        if kind == "stop":
            body["stop"] = self.random.choice("abcdefgh") if self.random.random() < 0.5 else [" ", "e"]
        if kind == "append" and self.agreed and self.messages[-1]["role"] == "user":
            body |= {"messages": self.messages[-1:], "append": True}
        if kind == "cancel":
            events = self.server.events("/v1/chat/completions", body, most=self.random.randint(1, 5))
            said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        else:
            said = self.server.chat(**body)["choices"][0]["message"]["content"]
        self.stream = self.server.stream(self.name)
        assert self.stream[: len(prompt)] == prompt
        answer = self.stream[len(prompt) :]
        assert answer == self.replayed(prompt, len(answer), how)
        self.check_text(kind, said, answer, most, body.get("stop", []))
        self.messages.append({"role": "assistant", "content": said})
        self.agreed = kind != "cancel"  # then the server may have sent more than the client has read

    def check_text(self, kind, said, answer, most, stop):
        """What the client got is the text of the stream; the stream ends where the answer had to end."""
        text = self.tokenizer.decode(answer[:-1] if answer[-1] == END else answer)
        if kind == "cancel":
            assert text.startswith(said)
            return
        ends = [text.index(each) for each in stop if each in text]
        assert said == text[: min(ends, default=None)]
        assert ends or answer[-1] == END or len(answer) == most

    def replayed(self, prompt, count, how):
        """Answer of a fresh session that sleeps only where the server says that the stream has slept, and with as many loops."""
        sleeps = {sleep["position"]: sleep["loops"] for sleep in self.about()["sleeps"]}
        session, said = zoo.Session(self.model, when="manual"), []
        sampler = Sampler(Sampling(tokens=count, **how), torch.tensor([prompt]), self.model.config.vocab_size)
        cuts = [0, *sorted(at for at in sleeps if 0 < at < len(prompt)), len(prompt)]
        for start, end in pairwise(cuts):
            if start in sleeps:
                session.sleep(sleeps[start])
            logits = session.feed(torch.tensor([prompt[start:end]]))
        while True:
            said.append(int(sampler(logits[:, -1])))
            if len(said) == count:
                return said
            if (at := len(prompt) + len(said) - 1) in sleeps:
                session.sleep(sleeps[at])
            logits = session.feed(torch.tensor([said[-1:]]))

    def about(self):
        status, about = self.server.ask(f"/v1/sessions/{self.name}")
        assert status == 200
        return about


def plainly(path):
    """Render conversations without transformers."""
    template = json.loads((path / "tokenizer_config.json").read_text())["chat_template"]
    rendered = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    return lambda messages: tokenizer.encode(rendered.render(messages=messages, add_generation_prompt=True), add_special_tokens=False).ids


def with_transformers(path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    return lambda messages: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    ("conversations", "oracle"), [(2, plainly), pytest.param(50, with_transformers, marks=pytest.mark.extended)], ids=["few", "many"]
)
@pytest.mark.parametrize("when", ["full", "idle(0.01)"])
@pytest.mark.parametrize(("template", "merges"), [(PLAIN, 0), (REASONING, 40)], ids=["plain", "reasoning"])
def test_random_conversations(tmp_path, template, merges, when, conversations, oracle):
    """Some are interrupted by the end of the server, or by a kill, after which its store is what it was at that moment."""
    path, store, turns = tmp_path / "model", tmp_path / "store", 10
    model = folder(path, template, merges)
    clients = [Client(model, path, seed, oracle(path)) for seed in range(conversations)]
    for start in range(0, turns, 2):
        with local(model, load_tokenizer(path, model.config.vocab_size), store=store, streams=conversations // 2 + 1, when=when) as server:
            for client in clients * 2:
                client.act(server)
            if start % 4 == 0:
                with server.nothing_written():
                    store = shutil.copytree(store, tmp_path / f"killed-{start}")

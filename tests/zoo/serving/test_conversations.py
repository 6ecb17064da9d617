"""Random conversations over HTTP: what a stream holds and says, beside a plain rendering and a plain session."""

import json
import random

import jinja2
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import zoo
from tests.zoo.serving.local import local
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
    zoo.save(model, path)
    made.save(str(path / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": made.token_to_id("<|end|>")}))
    return zoo.load(path)


class Client:
    """A chat window: it holds the messages, and does to them what users do."""

    def __init__(self, server, model, path, seed):
        self.server, self.model, self.random, self.name = server, model, random.Random(seed), f"chat-{seed}"
        template = json.loads((path / "tokenizer_config.json").read_text())["chat_template"]
        self.template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        self.oracle = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer = load_tokenizer(path, model.config.vocab_size)
        self.messages = [{"role": "system", "content": "Answer briefly, please."}] if seed % 2 else []
        self.agreed = False

    def act(self):
        """Do one thing, and compare what the server makes of it."""
        answered = [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]
        kind = self.random.choice(["turn", "turn", "edit", "again", "cancel", "stop", "error", "append"])
        if kind == "error":
            assert self.server.ask("/v1/chat/completions", {"messages": self.messages, "session": self.name, "bad": 1})[0] == 400
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
        body = {"messages": self.messages, "session": self.name, "max_tokens": self.random.randint(1, 20), **how}
        prompt = self.rendered()
        fresh = [int(token) for token in zoo.Session(self.model).generate(torch.tensor([prompt]), body["max_tokens"], stop=[1], **how)]
        text = self.tokenizer.decode(fresh[:-1] if fresh[-1] == 1 else fresh)
        if kind == "stop" and len(text) > 3:
            body["stop"] = text[2:4]
            text = text[: text.index(body["stop"])]
        if kind == "append" and self.agreed and self.messages[-1]["role"] == "user":
            body |= {"messages": self.messages[-1:], "append": True}
        if kind == "cancel":
            events = self.server.events("/v1/chat/completions", body, most=self.random.randint(1, 5))
            said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            assert text.startswith(said)
        else:
            said = self.server.chat(**body)["choices"][0]["message"]["content"]
            assert said == text, (kind, body)
        stream = self.server.stream(self.name)
        assert stream[: len(prompt)] == prompt
        assert stream[len(prompt) :] == fresh[: len(stream) - len(prompt)]  # a prefix: where the answer was ended
        self.messages.append({"role": "assistant", "content": said})
        self.agreed = kind != "cancel"  # then the server may have sent more than the client has read

    def rendered(self):
        text = self.template.render(messages=self.messages, add_generation_prompt=True)
        return self.oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("conversations", [2, pytest.param(50, marks=pytest.mark.extended)])
@pytest.mark.parametrize(("template", "merges"), [(PLAIN, 0), (REASONING, 40)], ids=["plain", "reasoning"])
def test_random_conversations(tmp_path, template, merges, conversations):
    model = folder(tmp_path / "model", template, merges)
    with local(model, load_tokenizer(tmp_path / "model", model.config.vocab_size), streams=conversations + 1) as server:
        for seed in range(conversations):
            client = Client(server, model, tmp_path / "model", seed)
            for _ in range(8):
                client.act()

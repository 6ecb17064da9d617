"""The conversation of `zoo chat`: what its stream reads and says is the conversation in the chat template, once."""

import io
import math

import jinja2
import pytest
from rich.console import Console
from tokenizers import Tokenizer

import zoo
from tests.zoo.serving.test_conversations import END, PLAIN, REASONING, folder
from zoo.serving.chat import converse
from zoo.text.tokenizers import ByteTokenizer, load_tokenizer

LINES = ["the quick brown fox", "jumps", "over the lazy dog", "and the end"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Screen(Console):
    """A console whose user types LINES."""

    def __init__(self, lines):
        super().__init__(file=io.StringIO(), width=200)
        self.lines = iter(lines)

    def input(self, prompt=""):
        try:
            return next(self.lines)
        except StopIteration:
            raise EOFError from None

    @property
    def text(self):
        return self.file.getvalue()


def chat(model, tokenizer, allowed, *, tokens=12, lines=LINES, seed=5):
    """Ids that the stream has read and said, the answers as ids, and the screen."""
    session, read, answers = zoo.Session(model), [], []
    generate = session.generate

    def recorded(ids, *arguments, **options):
        read.extend(ids[0].tolist())
        answers.append([])
        for token in generate(ids, *arguments, **options):
            answers[-1].append(int(token))
            read.append(int(token))
            yield token

    session.generate = recorded
    screen = Screen(lines)
    bias = {token: 0.0 if token in allowed else -math.inf for token in range(model.config.vocab_size)}
    converse(session, tokenizer, tokens, console=screen, temperature=50.0, seed=seed, logit_bias=bias)
    return read, answers, screen


def test_the_stream_is_the_conversation(tmp_path):
    """Also after answers that were cut at the maximum number of tokens, whose end the next turn adds."""
    model = folder(tmp_path / "model", PLAIN, 0)
    inner = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "model", model.config.vocab_size)
    read, answers, _ = chat(model, tokenizer, {END, *map(inner.token_to_id, LETTERS)})
    assert {answer[-1] == END for answer in answers} == {True, False}
    messages = []
    for line, answer in zip(LINES, answers, strict=True):
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": inner.decode(answer)}]
    want = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(PLAIN).render(messages=messages)
    stream = inner.decode(read, skip_special_tokens=False)
    assert want.startswith(stream)
    assert want[len(stream) :] in ("\n", "<|end|>\n")


def test_without_a_template_a_message_is_a_line():
    model = zoo.create("gdn4-sleep2-hard24", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)
    read, answers, _ = chat(model, ByteTokenizer(256, stop=[10]), {10, *LETTERS.encode()}, lines=LINES[:2])
    texts = [bytes(answer).decode().rstrip("\n") for answer in answers]
    want = "".join(f"user: {line}\nassistant: {text}\n" for line, text in zip(LINES, texts, strict=False))
    assert want.rstrip("\n") == bytes(read).decode().rstrip("\n")


def test_a_template_that_changes_earlier_answers_reads_only_the_new_message(tmp_path):
    model = folder(tmp_path / "model", REASONING, 0)
    inner = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "model", model.config.vocab_size)
    read, _, _ = chat(model, tokenizer, {inner.token_to_id("e")}, lines=LINES[:3])
    stream = inner.decode(read, skip_special_tokens=False)
    assert stream.count("<|start|>user") == stream.count("<|start|>assistant") == 3


@pytest.mark.parametrize("wrong", ["{{ raise_exception('not this one') }}", ""])
def test_a_message_that_the_template_refuses_does_not_end_the_conversation(tmp_path, wrong):
    template = "{% if messages[-1]['content'] == 'jumps' %}" + wrong + "{% else %}" + PLAIN + "{% endif %}"
    model = folder(tmp_path / "model", template, 0)
    tokenizer = load_tokenizer(tmp_path / "model", model.config.vocab_size)
    _, answers, screen = chat(model, tokenizer, {END}, lines=LINES[:3])
    assert len(answers) == 2
    assert ("not this one" if wrong else "renders this message as empty text") in screen.text


def test_the_largest_seed_has_a_next_one():
    model = zoo.create("gdn4-sleep2-hard24", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)
    assert len(chat(model, ByteTokenizer(), set(LETTERS.encode()), lines=LINES[:2], seed=2**63 - 1)[1]) == 2

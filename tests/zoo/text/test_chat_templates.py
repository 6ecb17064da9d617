"""Chat templates render as in transformers, from every place, with and without it; hostile ones are refused in time."""

import json
import resource
import sys
import time
from datetime import date
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import zoo
from zoo.text.chat_templates import Worker, choose, plain, render
from zoo.text.tokenizers import ByteTokenizer, load_tokenizer

TURN = "<|start|>{{ m.role }}\n{{ m['content'] }}<|end|>\n"
TAIL = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}\n    " + TURN + "{%- endfor %}" + TAIL,
    "generation": "{% for m in messages %}{% generation %}" + TURN + "{% endgeneration %}{% endfor %}" + TAIL,
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% elif loop.first %}{% continue %}{% endif %}"
    + TURN
    + "{% endfor %}",
    "strftime_now": "Today: {{ strftime_now('%Y-%m-%d') }}{{ messages[0].content }}" + TAIL,
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}"
    "{% set ns = namespace(a=dict(x=1)) %}{% set ns.b = 2 %}{{ ns.a.x + ns.b }}",
    "tools": "{% if tools is none %}none{% else %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% if documents %}{{ documents }}{% endif %}{% for m in messages %}{{ m.content if m.content is defined }}"
    "{% for call in m.tool_calls or [] %}{{ call }}{% endfor %}"
    "{{ m.reasoning_content }}{% endfor %}" + TAIL,
    "named": {"default": "default:{{ messages[0].content }}" + TAIL, "tool_use": "tools:{{ tools | length }}", "rag": "{{ documents }}"},
}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Où est 日本?"},
    {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [{"name": "map", "arguments": {"b": 1, "a": [2.5, None]}}]},
    {"role": "user", "content": "again"},
]
TOOLS = [{"type": "function", "function": {"name": "map", "parameters": {"type": "object", "properties": {"b": {"type": "integer"}}}}}]
STORED = json.loads((Path(__file__).parents[2] / "data/chat_templates.json").read_text(encoding="utf-8"))
SPECIAL = ("<|bos|>", "<|end|>")
HOSTILE = {
    "endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one endless operation": "{{ 7 ** (7 ** 9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "huge output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "huge value": "{{ 'x' * 10 ** 10 }}",
    "doubling": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "exception": "{{ raise_exception('no\nsystem prompt') }}",
    "syntax": "{% for %}",
}


def write_folder(folder, template, *, in_file):
    """A tokenizer of bytes with the template in files of its own, or in tokenizer_config.json."""
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    if not in_file:
        named = isinstance(template, dict)
        fields["chat_template"] = [{"name": n, "template": t} for n, t in template.items()] if named else template
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    if in_file:
        templates = template if isinstance(template, dict) else {"default": template}
        (folder / "chat_template.jinja").write_text(templates.pop("default"))
        (folder / "additional_chat_templates").mkdir()
        for name, text in templates.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)


VARIABLES = ({}, {"tools": TOOLS}, {"documents": [{"title": "a", "text": "b"}]}, {"add_generation_prompt": False})


@pytest.mark.parametrize("in_file", [True, False], ids=["jinja", "json"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_stored_renderings(name, in_file, tmp_path):
    """The texts are those of transformers 5.23 for the same folder, with DATE for the day."""
    template = TEMPLATES[name]
    write_folder(tmp_path, dict(template) if isinstance(template, dict) else template, in_file=in_file)
    tokenizer = load_tokenizer(tmp_path, 300)
    for variables, text in zip(VARIABLES, STORED[name], strict=True):
        assert tokenizer.render(MESSAGES, **variables) == text.replace("DATE", date.today().isoformat())


@pytest.mark.extended
@pytest.mark.parametrize("in_file", [True, False], ids=["jinja", "json"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name, in_file, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    template = TEMPLATES[name]
    write_folder(tmp_path, dict(template) if isinstance(template, dict) else template, in_file=in_file)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    ours = [load_tokenizer(tmp_path, 300)]
    monkeypatch.setitem(sys.modules, "transformers", None)
    ours.append(load_tokenizer(tmp_path, 300))
    for variables in VARIABLES:
        right = oracle.apply_chat_template(MESSAGES, tokenize=False, **{"add_generation_prompt": True, **variables})
        for tokenizer in ours:
            assert tokenizer.render(MESSAGES, **variables) == right
            assert tokenizer.chat(MESSAGES, **variables) == oracle(right, add_special_tokens=False).input_ids
    if name == "named":
        assert ours[0].render(MESSAGES, template="rag", documents=[{"title": "t"}]) == "[{'title': 't'}]"
        with pytest.raises(zoo.ZooError, match="there is no 'rga'; allowed: "):
            ours[0].render(MESSAGES, template="rga")


def cpu_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_in_time(name):
    assert render("{{ messages[1].content }}", MESSAGES) == "Où est 日本?"  # a process renders
    started, own, children = time.monotonic(), time.process_time(), cpu_of_children()
    with pytest.raises(zoo.ZooError, match=r"^chat template: .") as refused:
        render(HOSTILE[name], MESSAGES)
    assert "\n" not in str(refused.value)
    assert time.process_time() - own < 0.2  # the work is done in the other process, which is ended
    assert cpu_of_children() - children < 1.5  # its start, and half a second for the template
    assert time.monotonic() - started < 10  # less than a second on a quiet machine
    assert render("{{ messages[1].content }}", MESSAGES) == "Où est 日本?"  # and the next one is served


def test_an_interrupted_rendering_leaves_no_reply_to_the_next(monkeypatch):
    worker = Worker()

    def asked(text):
        return worker.ask(json.dumps({"template": text, "most": 100, "variables": {}}))["text"]

    assert asked("one") == "one"

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(worker._process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        asked("two")
    assert asked("three") == "three"
    worker.close()


def test_a_long_conversation_is_rendered():
    messages = [{"role": "user", "content": "x" * 1000}] * 2000
    text = render("{% for m in messages %}" + TURN + "{% endfor %}", messages)
    assert len(text) == 2000 * len("<|start|>user\n<|end|>\n" + "x" * 1000)


def test_choice_of_a_template():
    assert choose({}, None, None) is None
    with pytest.raises(zoo.ZooError, match="there is no 'default'; allowed: rag"):
        choose({"rag": ""}, None, None)


@pytest.mark.parametrize("missing", ["role", "content"])
def test_a_message_without_a_field_is_refused(missing):
    message = {"role": "user", "content": "hi"}
    del message[missing]
    with pytest.raises(zoo.ZooError, match=rf"^messages.0.{missing}: None; without a chat template, want a text$"):
        plain([message])


def test_content_that_is_not_text_needs_a_template():
    with pytest.raises(zoo.ZooError, match=r"messages\.1\.content: None; without a chat template, want a text"):
        ByteTokenizer().render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]}])

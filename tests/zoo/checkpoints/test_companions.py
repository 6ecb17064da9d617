"""A folder is a whole model: its tokenizer, templates, end tokens and sleep settings travel through every command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click import Command
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import zoo
from zoo.cli import main
from zoo.export.cli import main as export
from zoo.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.extended  # the checkpoints are written by transformers
TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json"}
END = 257


def zoo_command(*arguments: object, command: Command = main, **more: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], **more)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint as transformers writes it, with a tokenizer of bytes whose ids are not the byte values."""
    import transformers

    folder: Path = tmp_path_factory.mktemp("companions") / "source"
    config = transformers.Qwen3Config(
        vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<|start|>", "<|end|>")])
    made.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END], "temperature": 0.5}))
    return folder


def carries(folder: Path, source: Path) -> bool:
    return all((folder / name).read_bytes() == (source / name).read_bytes() for name in FILES)


def answer(folder: Path, *more: str) -> str:
    """What `zoo chat` says, with the same seed."""
    said = zoo_command("chat", folder, *more, "--tokens", "12", "--seed", "3", input="Où?\nand?\n")
    return "\n".join(line for line in said.splitlines() if "bytes, cache" not in line)  # a bundle's cache is a ring


@pytest.mark.parametrize("form", ["zoo", "hf"])
def test_transformers_reads_the_tokenizer_of_a_copy(source: Path, tmp_path: Path, form: str) -> None:
    from transformers import AutoTokenizer

    zoo_command("convert", source, tmp_path / "copy", "--to", form)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "copy"), AutoTokenizer.from_pretrained(source)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("form", ["zoo", "hf"])
def test_convert_copies_the_whole_model_and_gives_it_sleep_settings(source: Path, tmp_path: Path, form: str) -> None:
    copy = tmp_path / "copy"
    zoo_command("convert", source, copy, "evict=sliding", "window=8", "loops=2", "--to", form)
    assert carries(copy, source)
    model = zoo.load(copy)
    assert (model.config.loops, model.config.evict, model.config.window) == (2, "sliding", 8)
    assert answer(copy) == answer(source, "evict=sliding", "window=8", "loops=2")
    assert answer(copy, "evict=none", "loops=1") == answer(source)
    (copy / "generation_config.json").unlink()
    (copy / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(copy, 258).stop == (END,)  # from the config that came with it


def test_train_and_export_keep_the_whole_model(source: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint16)
    np.save(tmp_path / "train.npy", tokens[:3000])
    np.save(tmp_path / "test.npy", tokens[3000:])
    (tmp_path / "run.yaml").write_text(
        f"model: {source.resolve()}\n"
        "overrides: {evict: sliding, window: 8}\n"
        "task: {name: text, train: train.npy, test: test.npy, vocab: 258, length: 16, width: 8}\n"
        "steps: 3\nbatch_size: 2\neval_sequences: 2\ncheckpoint_every: 2\nlr: 1.0e-9\n"
    )
    run = tmp_path / "run"
    zoo_command("train", tmp_path / "run.yaml", "--out", run)
    assert carries(run, source)
    assert carries(run / "checkpoints" / "00000002", source)
    first = zoo.load(source)
    for name, tensor in zoo.load(run).state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], atol=1e-6, rtol=0)  # it began from the weights of the folder
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir(source)
        assert "window" in zoo_command("eval", run, "--sequences", 2)
    assert answer(run) == answer(source, "evict=sliding", "window=8")
    assert answer(run, "evict=none") == answer(source)
    for name, options in {"plain": ["--max-length", "128"], "bundle": ["evict=sliding", "window=8"]}.items():
        zoo_command(source, "--out", tmp_path / name, *options, "--prefill", "0", "--no-verify", command=export)
        assert carries(tmp_path / name, source)
    assert answer(tmp_path / "plain") == answer(source)
    assert answer(tmp_path / "bundle") == answer(run)
    result = CliRunner().invoke(main, ["chat", str(tmp_path / "bundle"), "loops=2"])
    assert (result.exit_code, "an exported bundle is fixed" in result.output) == (2, True)


def test_a_copy_has_what_was_read_even_if_the_source_has_changed(source: Path, tmp_path: Path) -> None:
    model = zoo.load(source)
    zoo.save(model, tmp_path / "first")
    again = zoo.load(tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").unlink()
    zoo.save(again, tmp_path / "second")
    assert carries(tmp_path / "second", source)


def test_paths_in_a_run_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.training.config import read_config

    (tmp_path / "a").mkdir()
    (tmp_path / "base.yaml").write_text("model: gdn4\nsteps: 1\nweights: w\ntask: {name: text, train: one.npy, vocab: 3, test: /two.npy}\n")
    (tmp_path / "a" / "run.yaml").write_text("base: ../base.yaml\ntask: {test: two.npy}\n")
    monkeypatch.chdir(tmp_path / "a")
    config = read_config("run.yaml", {"steps": 2})
    assert config.task["train"] == str(tmp_path / "one.npy")
    assert config.task["test"] == str(tmp_path / "a" / "two.npy")
    assert config.weights == str(tmp_path / "w")
    assert read_config(tmp_path / "base.yaml").task["test"] == "/two.npy"
    assert read_config("gsm-jet2b").task["tokenizer"] == "hub:jet-ai/Jet-Nemotron-2B"

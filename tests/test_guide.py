"""The commands of docs/guide.md, run in order on a checkpoint of the same family with fewer and narrower layers."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch
import yaml
from click.testing import CliRunner

import zoo
from tests.zoo.text.test_chat_templates import write_folder
from zoo.cli import main
from zoo.costs import training_flops
from zoo.export.cli import main as export

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SMALLER = {
    "=512": "=64",
    "window: 512": "window: 64",
    "width: 512": "width: 64",
    "2048": "256",
    "100352": "258",
    "steps: 1000": "steps: 2",
    "batch_size: 8": "batch_size: 2",
    "--sequences 256": "--sequences 4",
}


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    for ours, small in SMALLER.items():
        text = text.replace(ours, small)
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a checkpoint, its tokenizer, and documents."""
    model = zoo.create(
        "granite4-h-350m",
        layers="mamba2 attn mamba2",
        d_model=32,
        d_ff=64,
        vocab_size=258,
        blocks={"mamba2": {"head_dim": 16, "state_dim": 16}, "attn": {"heads": 2, "kv_heads": 1}},
    )
    zoo.save(model, tmp_path / "models" / "granite", format="hf")
    write_folder(tmp_path / "models" / "granite", "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", in_file=True)
    words = ["the", "model", "sleeps", "over", "its", "window", "and", "keeps", "what", "it", "has", "read"]
    rows = [json.dumps({"text": " ".join(random.Random(i).choices(words, k=150))}) for i in range(200)]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.jsonl").write_text("\n".join(rows))
    (tmp_path / "sleeper.yaml").write_text(block("yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def served_answer(command, folder, *said):
    """Start a server, send a conversation in the session `s`, and stop the server."""
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen([sys.executable, "-m", "zoo", *command, "--port", "0"], stdout=log, stderr=log, env=environment)
    try:
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", (folder / "log").read_text())):
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        client = openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0)
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
        asked = {"messages": messages, "temperature": 0, "max_tokens": 4}
        return client.chat.completions.create(model=client.models.list().data[0].id, **asked, extra_body={"session": "s"})
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_the_commands_of_the_guide(folder, exported):
    said = {}
    for line in block("bash").splitlines():
        if "bundle" in line and not exported:
            continue
        program, *arguments = line.split()
        result = CliRunner().invoke(main if program == "zoo" else export, arguments, input="the model sleeps\n")
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception!r}"
        said[line] = result.output
    described, compared = next(iter(said.values())), said["zoo eval runs/sleeper --compare --sequences 4"]
    assert "(4 passes of layers 0-2)" in described
    assert all(arm in compared for arm in ("full attention", "sliding", "hard"))
    config = zoo.load("runs/sleeper").config
    assert (config.loops, config.evict, config.window) == (4, "hard", 64)
    assert yaml.safe_load(Path("data/data.yaml").read_text())["vocab"] == 258
    if exported:
        (command,) = re.findall(r"`zoo (serve bundle [^`]*)`", GUIDE)
        first = served_answer(command.split(), folder, "the model sleeps")
        said = first.choices[0].message.content
        again = served_answer(command.split(), folder, "the model sleeps", said, "and keeps")
        assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens  # the conversation was kept


def test_the_figures_of_the_guide():
    """Those of `zoo describe`, and the FLOPs of a sequence as training counts them."""
    asked = re.search(r"^zoo describe models/granite (.*)$", GUIDE, flags=re.MULTILINE)[1]
    said = CliRunner().invoke(main, ["describe", "granite4-h-350m", *asked.split()]).output
    shown = re.search(r"^    granite\n(.*?)\n\n", GUIDE, flags=re.MULTILINE | re.DOTALL)[1]
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in said.splitlines()[2:]]
    settings = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)[1])
    model = zoo.create("granite4-h-350m", device="meta", sleep_on="every", **settings["overrides"])
    mask = torch.ones(1, settings["task"]["length"], dtype=torch.bool)
    assert f"{training_flops(model, mask) / 1e12:.1f} T for a sequence of 2,048 tokens" in GUIDE

"""The section of docs/training.md that takes a model from text to answers about contexts that it has slept on and evicted."""

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from click.testing import CliRunner

from zoo.cli import main

TRAINING = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
SECTION = TRAINING.split("## Questions about a context that is evicted")[1].split("\n## ")[0]
SMALLER = {"4000": "40", "200": "8", "steps: 300": "steps: 2", "batch_size: 64": "batch_size: 4", "batch_size: 16": "batch_size: 2"}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_questions_about_evicted_contexts(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    for text in re.findall(r"^```(?:python|yaml)\n(.*?)^```", SECTION, flags=re.MULTILINE | re.DOTALL):
        for full, small in {} if whole else SMALLER.items():
            text = text.replace(full, small)
        Path(re.match(r"# (\w+\.\w+)", text)[1]).write_text(text)
    (commands,) = re.findall(r"^```bash\n(.*?)^```", SECTION, flags=re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
            continue
        if arguments[0] == "tokenize":
            arguments[1:2] = map(str, sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
        if arguments[0] == "eval":
            arguments += ["--json", *([] if whole else ["--sequences", "4"])]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception!r}"
        said = result.stdout
        if "--compare" in arguments:
            arms = {arm["name"]: arm for arm in json.loads(said)["arms"]}
    assert [arm["loops"] for arm in arms.values()] == [1, 1, 1, 1, 2]
    assert json.loads(said)["bits_per_byte"] > 0
    if whole:
        assert json.loads(Path("runs/asleep/results.json").read_text())["first"] > 0.95
        assert arms["parent, full attention"]["accuracy"] >= arms["this model"]["accuracy"] > 0.95
        assert arms["this model"]["accuracy"] >= arms["parent, hard eviction"]["accuracy"]

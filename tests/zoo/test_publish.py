"""Publishing: what is uploaded loads back equal, and the card's metadata is read by huggingface_hub."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from click.testing import CliRunner

import zoo
from tests.zoo.training.tiny import TINY, tiny
from zoo.cli import main
from zoo.config import validate
from zoo.publish import _settings, push
from zoo.training.config import TrainConfig
from zoo.training.loop import train


class Uploads:
    """Stand-in for `HfApi`: `create_commit` writes the files to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def create_repo(self, repository, *, private, exist_ok):
        self.calls.append((repository, private, exist_ok))

    def list_repo_files(self, repository, *, revision):
        return [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()]

    def create_commit(self, repository, operations, *, commit_message, revision):
        self.calls.append((repository, revision))
        for operation in operations:
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                (self.folder / operation.path_in_repo).unlink()
                continue
            with operation.as_file() as file:
                (self.folder / operation.path_in_repo).write_bytes(file.read())


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    made = Uploads(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_a_run_loads_back_equal(tmp_path, uploads):
    zoo.save(zoo.create(TINY["model"], **TINY["overrides"], vocab_size=8), tmp_path / "parent")
    settings = tiny(model=str(tmp_path / "parent"), overrides={"loops": 3})
    train(settings, tmp_path / "run")
    (tmp_path / "run" / "tokenizer_config.json").write_text("{}")
    result = CliRunner().invoke(main, ["push", str(tmp_path / "run"), "me/sleeper", "--revision", "v1"])
    assert (result.exit_code, result.stdout) == (0, "published as hf://me/sleeper@v1\n"), result.output
    assert uploads.calls == [("me/sleeper", True, True), ("me/sleeper", "v1")]
    assert sorted(file.name for file in uploads.folder.iterdir()) == ["README.md", "model.safetensors", "tokenizer_config.json", "zoo.yaml"]
    ours, theirs = zoo.load(tmp_path / "run"), zoo.load(uploads.folder)
    assert ours.config == theirs.config
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    card = huggingface_hub.ModelCard.load(uploads.folder / "README.md")
    assert card.data.library_name == "sleep-zoo"
    assert {"attn", "gdn"} < set(card.data.tags)
    assert "passes of layers 0-1" in card.text
    assert re.search(r"\| accuracy \| best guess \|\n.*\n\| \d\.\d{4} \| \d+\.\d\d% \| ", card.text)
    assert str(tmp_path) not in card.content
    assert "`zoo train train.yaml`, where train.yaml is:" in card.text
    made = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", card.text, re.MULTILINE | re.DOTALL)[1])
    assert validate(TrainConfig, made, "card") == settings.model_copy(update={"model": "parent"})


def test_a_card_names_no_folder_of_the_corpora():
    about = {"task": {"name": "text", "train": {"/home/me/one/train.npy": 3, "/home/me/two/train.npy": 1}, "test": "/home/me/test.npy"}}
    text = _settings(validate(TrainConfig, {"model": "gdn4", **about, "steps": 1, "batch_size": 1, "lr": 1}, "run"))
    assert yaml.safe_load(text)["task"] == {"name": "text", "train": {"one/train.npy": 3, "two/train.npy": 1}, "test": "test.npy"}


def test_an_existing_card_is_kept(tmp_path, uploads):
    zoo.save(zoo.create("gdn4", layers="gdn", d_model=16, d_ff=16), tmp_path / "model")
    (uploads.folder / "README.md").write_text("mine")
    assert CliRunner().invoke(main, ["push", str(tmp_path / "model"), "me/sleeper", "--public"]).exit_code == 0
    assert uploads.calls[0] == ("me/sleeper", False, True)
    assert (uploads.folder / "README.md").read_text() == "mine"
    assert (uploads.folder / "zoo.yaml").is_file()


def test_files_of_an_earlier_model_are_deleted(tmp_path, uploads):
    zoo.save(zoo.create("gdn4", layers="gdn", d_model=16, d_ff=16), tmp_path / "model")
    old = [
        "chat_template.jinja", "additional_chat_templates/tool.jinja", "generation_config.json", "config.json", "pytorch_model.bin",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter.safetensors", "zoo.yaml",
    ]  # fmt: skip
    kept = ["README.md", "image.png", "notes/config.json", "notes/model.safetensors"]
    for name in [*old, *kept]:
        (uploads.folder / name).parent.mkdir(exist_ok=True)
        (uploads.folder / name).write_text("old")
    push(tmp_path / "model", "me/sleeper")
    assert sorted(uploads.list_repo_files("me/sleeper", revision=None)) == sorted([*kept, "model.safetensors", "zoo.yaml"])
    assert zoo.load(uploads.folder).companions == {}


@pytest.mark.parametrize(
    ("folder", "repository", "message"),
    [("model", "sleeper", "repository: 'sleeper'; want OWNER/NAME"), ("nothing", "me/sleeper", "nothing: no such folder")],
)
def test_what_cannot_be_published_is_refused_at_once(tmp_path, monkeypatch, uploads, folder, repository, message):
    monkeypatch.chdir(tmp_path)
    zoo.save(zoo.create("gdn4", layers="gdn", d_model=16, d_ff=16), "model")
    result = CliRunner().invoke(main, ["push", folder, repository])
    assert result.exit_code == 2
    assert message in result.stderr
    assert uploads.calls == []


def test_an_error_of_the_hub_is_one_line(tmp_path, monkeypatch, uploads):
    zoo.save(zoo.create("gdn4", layers="gdn", d_model=16, d_ff=16), tmp_path / "model")

    def refuse(*args, **options):
        raise OSError("401 Client Error.\n\nInvalid username or password.")

    monkeypatch.setattr(uploads, "create_repo", refuse, raising=False)
    with pytest.raises(zoo.ZooError, match=r"me/sleeper: cannot be published: 401 Client Error. Invalid username or password.$"):
        push(tmp_path / "model", "me/sleeper")

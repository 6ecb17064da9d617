"""Publish a model on the Hugging Face hub, with a card that says how it sleeps and how good it is."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from zoo.checkpoints.companions import COMPANIONS
from zoo.checkpoints.hub import DOWNLOADED, PREFIX, is_repository
from zoo.checkpoints.own import read_config, stored_dtype
from zoo.config import ModelConfig
from zoo.costs import describe
from zoo.errors import ZooError, counted
from zoo.training.config import TrainConfig
from zoo.training.run_folder import RESULTS
from zoo.training.trained import Trained, find

CARD = "README.md"
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Names of weights that are read where there are no others."""


def push(path: Path, repository: str, *, revision: str | None = None, public: bool = False) -> str:
    """Upload the model in a folder, or of a run, in one commit, and return its address for `zoo.load`.

    The weights, the config, the tokenizer and its templates are uploaded as they are; such files of an earlier model in the
    repository are deleted. A card is written unless the repository has one.

    Args:
        repository: OWNER/NAME; created if there is none.
        revision: branch; default: the main branch.
        public: whether a new repository is public.
    Raises:
        ZooError: not a model, huggingface_hub is not installed, or the hub refuses the upload.
    """
    if not is_repository(repository):
        raise ZooError(f"repository: '{repository}'; want OWNER/NAME")
    trained = find(path)
    config = read_config(trained.folder)
    files = sorted(file for pattern in (*DOWNLOADED, *COMPANIONS) for file in trained.folder.glob(pattern))
    if not any(file.suffix == ".safetensors" for file in files):
        raise ZooError(f"{trained.folder}: no weights in safetensors; want a folder written by zoo.save, zoo train or zoo convert")
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    except ImportError:
        raise ZooError(f"{repository}: publishing needs pip install 'sleep-zoo[hub]'") from None
    try:
        hub = HfApi()
        hub.create_repo(repository, private=not public, exist_ok=True)
        uploaded = {file.relative_to(trained.folder).as_posix(): file for file in files}
        operations: list[Any] = [CommitOperationAdd(name, file) for name, file in uploaded.items()]
        there = hub.list_repo_files(repository, revision=revision)
        operations += [CommitOperationDelete(name, is_folder=False) for name in there if _is_read(name) and name not in uploaded]
        if CARD not in there:
            operations.append(CommitOperationAdd(CARD, card(trained, config, repository).encode()))
        hub.create_commit(repository, operations, commit_message=f"{config.name} from sleep-zoo", revision=revision)
    except Exception as error:  # whichever exception the network or the hub raises
        raise ZooError(f"{repository}: cannot be published: {' '.join(str(error).split()) or type(error).__name__}") from None
    return f"{PREFIX}{repository}" + (f"@{revision}" if revision else "")


def _is_read(name: str) -> bool:
    """Return whether a file of a repository belongs to the model in it: whether its name is one that this package reads."""
    return any(PurePosixPath(f"/{name}").match(f"/{pattern}") for pattern in (*DOWNLOADED, *COMPANIONS, *OTHER_WEIGHTS))


def card(trained: Trained, config: ModelConfig, repository: str) -> str:
    """Return the text of a model card: metadata, how to load the model, its sizes and costs, and the command and results of its run."""
    metadata: dict[str, Any] = {
        "library_name": "sleep-zoo",
        "pipeline_tag": "text-generation",
        "tags": ["sleep-zoo", "hybrid", *sorted(set(config.pattern))],
        **({"base_model": config.hub.partition("@")[0]} if config.hub else {}),
    }
    sizes = describe(config, dtype=stored_dtype(trained.folder))
    text = f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {config.name}\n\n"
    text += f'```python\nimport zoo\n\nmodel = zoo.load("{PREFIX}{repository}")\n```\n\n```\n{sizes}\n```\n'
    if trained.run is not None:
        progress = "" if trained.step in (None, trained.run.steps) else f", stopped after step {trained.step}"
        text += f"\n## Training\n\n`zoo train train.yaml`{progress}, where train.yaml is:\n\n```yaml\n{_settings(trained.run)}```\n"
    results = trained.folder / RESULTS
    if trained.run is not None and results.is_file():
        found = json.loads(results.read_text(encoding="utf-8"))
        amount = f"{counted(trained.run.steps, 'step')} of {counted(trained.run.batch_size, 'sequence')}"
        text += f"\n## Results\n\nTask {found['task'].partition(' ')[0]}, {amount}.\n\n"
        text += "| held-out loss | accuracy | best guess |\n|---:|---:|---:|\n"
        text += f"| {found['loss']:.4f} | {found['accuracy']:.2%} | {found['chance']:.2%} |\n"
    return text


def _settings(run: TrainConfig) -> str:
    """Return the settings of a run that are not defaults, as YAML, without the folders in which its files lie."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            folders = [os.path.dirname(name) for name in value if os.path.isabs(name)]  # files of one name stay apart
            shared = os.path.commonpath(folders) if folders else ""
            return {os.path.relpath(name, shared) if os.path.isabs(name) else name: public(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [public(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return yaml.safe_dump(public(run.model_dump(mode="json", exclude_defaults=True)), sort_keys=False)

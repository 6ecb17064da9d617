"""Download models from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from zoo.checkpoints.companions import COMPANIONS
from zoo.errors import ZooError
from zoo.files import as_path

PREFIX = "hf://"
DOWNLOADED = ("config.json", "zoo.yaml", "model*.safetensors", "model.safetensors.index.json")
"""Files of a repository that hold a model in one format; its tokenizer and other companions come with them."""
TIMEOUT = 3
"""Seconds to wait for the hub's answer."""


def local_folder(source: str | Path, name: str = "path") -> Path:
    """Return `source` as a path; "hf://owner/name" or "hf://owner/name@revision" is downloaded first. Raises ZooError."""
    if not (isinstance(source, str) and source.startswith(PREFIX)):
        return as_path(source, name)
    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    if not is_repository(repository) or source.endswith("@"):
        raise ZooError(f"{name}: '{source}': want hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return _download(repository, revision or None, f"{name}: {source}")


def is_repository(name: str) -> bool:
    """Return whether this can be the name of a repository: OWNER/NAME."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _download(repository: str, revision: str | None, label: str) -> Path:
    """Download a repository; returns its folder in the cache of huggingface_hub: the config and one format of the weights.

    Without a network, that folder is returned as it is, if there is one.

    Args:
        revision: branch, tag or commit; default: the main branch.
        label: start of an error.
    Raises:
        ZooError: huggingface_hub is not installed, or the repository or the revision cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ZooError(f"{label}: downloading {repository} needs pip install 'sleep-zoo[hub]', or give a folder") from None
    offline = _why_offline(repository)
    options: dict[str, Any] = {"revision": revision, "etag_timeout": TIMEOUT, "local_files_only": offline is not None}
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*DOWNLOADED, *COMPANIONS], **options))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repository, allow_patterns=["pytorch_model.bin"], **options)
    except Exception as error:  # whichever exception the network or the hub raises
        lines = [line.strip() for line in (offline or str(error)).splitlines() if line.strip()]
        why = next((line for line in lines if not re.match(r"\d{3} \w+ Error", line)), type(error).__name__)  # the status says too little
        raise ZooError(f"{label}: {repository} cannot be downloaded: {why.rstrip('.')}; give the path of a folder instead") from None
    if not (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):
        raise ZooError(f"{label}: {repository} holds no model: neither model.safetensors nor pytorch_model.bin")
    return folder


def _why_offline(repository: str) -> str | None:
    """Return why the hub does not answer; None if it does. huggingface_hub itself may wait for an answer forever."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    found: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            HfApi().model_info(repository, timeout=TIMEOUT)
            found.put(None)
        except HfHubHTTPError:
            found.put(None)
        except Exception as error:  # whichever exception the network raises
            found.put(str(error) or type(error).__name__)

    Thread(target=ask, daemon=True).start()  # neither names nor several addresses of a host have a timeout
    try:
        return found.get(timeout=TIMEOUT)
    except Empty:
        return f"no answer within {TIMEOUT} seconds"

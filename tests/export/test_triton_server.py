"""Our repositories on a Triton Inference Server, that of nvidia-pytriton; its requests as JSON over HTTP."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zoo
from tests.export.conftest import SMALL
from zoo.export.plan import Plan
from zoo.export.python_backend import SEQUENCES, TritonPythonModel
from zoo.export.triton_server import export_to_repository

NAME = "gdn4-sleep2-hard6"


def server_folder():
    """Folder of the server, which `pip install --no-deps nvidia-pytriton==0.7.0` brings."""
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None, "pytriton is missing: pip install --no-deps nvidia-pytriton==0.7.0"
    return Path(spec.origin).parent / "tritonserver"


@pytest.fixture(scope="module")
def model():
    return zoo.create(NAME, **{**SMALL, "layers": "attn gdn"})


@pytest.fixture(scope="module")
def repository(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("triton") / "models"
    export_to_repository(model, place, plan=Plan(prefill=4), verified=False)
    return place


def start(repository, backends, log, *options):
    """Start a server. Returns its process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        server_folder() / "bin/tritonserver", "--model-repository", repository, "--backend-directory", backends,
        "--http-address", "127.0.0.1", "--http-port", port, "--allow-grpc", "false", "--allow-metrics", "false", *options,
    ]  # fmt: skip
    environment = {  # its Python is the first in the path
        **os.environ,
        "LD_LIBRARY_PATH": str(server_folder().parents[1] / "nvidia_pytriton.libs"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as out:
        return subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment), f"http://127.0.0.1:{port}/v2"


@pytest.fixture(scope="module")
def url(repository, tmp_path_factory):
    place, python = tmp_path_factory.mktemp("server"), f"{sys.version_info.major}.{sys.version_info.minor}"
    (place / "python").mkdir()
    for file in [*(server_folder() / "backends/python").iterdir(), *(server_folder() / "python_backend_stubs" / python).iterdir()]:
        (place / "python" / file.name).symlink_to(file)
    server, address = start(repository, place, place / "log", "--model-config-name", "python")
    try:
        while not answers(f"{address}/health/ready"):
            assert server.poll() is None, (place / "log").read_text()
            time.sleep(0.2)
        yield f"{address}/models/{NAME}/infer"
    finally:
        server.terminate()
        server.wait(60)


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def ask(url, ids, sequence, **controls):
    """Logits of the token that follows ids, or the error of the server."""
    parameters = {"sequence_id": sequence, **{f"sequence_{name}": value for name, value in controls.items()}}
    inputs = [{"name": "input_ids", "shape": [1, len(ids)], "datatype": "INT64", "data": ids}]
    body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
            (output,) = json.loads(response.read())["outputs"]
    except urllib.error.HTTPError as error:
        return json.loads(error.read())["error"]
    return torch.tensor(output["data"]).reshape(output["shape"])


@pytest.mark.parametrize("name", ["../escaped", "/tmp/abs", "org/model", "..", ".", "a\\b"])
def test_a_name_that_leads_out_of_the_repository_is_refused(tmp_path, name):
    with pytest.raises(zoo.ZooError, match=r"^name: .* want a name without slashes"):
        export_to_repository(zoo.create("gdn4", **SMALL, name=name, device="meta"), tmp_path / "models")
    assert not any(tmp_path.iterdir())


def test_a_refused_start_or_end_leaves_no_session(monkeypatch, model):
    """Otherwise many of them would push out the sequences that are being read."""
    server = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: request[name],
        Tensor=SimpleNamespace(from_dlpack=lambda name, tensor: tensor),
        InferenceResponse=lambda tensors=None, error=None: error or tensors,
        TritonError=str,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    monkeypatch.setattr("zoo.export.python_backend.ExportedModel", lambda folder: model)
    backend = TritonPythonModel()
    backend.initialize({"model_repository": "models", "model_version": "1"})

    def asked(ids, sequence, *, start=0, end=0):
        request = {"input_ids": [ids], "CORRID": [sequence], "START": [start], "END": [end]}
        return backend.execute([{name: torch.tensor(values) for name, values in request.items()}])[0]

    asked([1], 1000, start=1)
    for sequence in range(SEQUENCES):
        assert "vocabulary" in asked([99], sequence, start=1, end=sequence % 2)
    assert "vocabulary" in asked([99], 1000)
    assert torch.is_tensor(asked([2], 1000)[0])
    assert "vocabulary" in asked([99], 1000, end=1)
    assert "does not exist" in asked([2], 1000)


@pytest.mark.extended
def test_two_sequences_in_turn_equal_pytorch(url, model):
    """Prompts that are longer and shorter than a window, then 40 tokens each, over many sleeps."""
    prompts = {7: [1, 2, 3, 4, 5, 6, 7, 8, 9], 9: [3, 1, 4]}
    want = {n: list(map(int, zoo.Session(model).generate(torch.tensor([ids]), 40))) for n, ids in prompts.items()}
    logits = {n: ask(url, ids, n, start=True, end=False) for n, ids in prompts.items()}
    assert logits[7].shape == (1, 1, model.config.vocab_size)
    said = {n: [] for n in prompts}
    for turn in range(40):
        for n in prompts:
            said[n].append(int(logits[n].argmax()))
            logits[n] = ask(url, said[n][-1:], n, start=False, end=turn == 39)
    assert said == want
    stream = zoo.Session(model)
    last = stream.feed(torch.tensor([[*prompts[9], *want[9]]]))[:, -1:]
    torch.testing.assert_close(logits[9], last, atol=1e-4, rtol=1e-4)


@pytest.mark.extended
def test_refused_requests(url):
    """Tokens outside the vocabulary do not end a sequence; a sequence must start, and is gone after its end."""
    first = ask(url, [1], 5, start=True, end=False)
    assert "vocabulary" in ask(url, [11], 5, start=False, end=False)
    assert ask(url, [2], 5, start=False, end=True).shape == first.shape
    for sequence in (5, 6):
        assert "must specify the START flag" in ask(url, [1], sequence, start=False, end=False)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("", "", "unable to find backend library for backend 'onnxruntime'"),
        ("initial_state", "initial_states", 'has no field named "initial_states"'),
        ("zero_data: true", "zero_data: true data_file: 'zeros'", 'Field "data_file" is specified along with field "zero_data"'),
        ("TYPE_INT64", "TYPE_INT65", 'Unknown enumeration value of "TYPE_INT65"'),
    ],
    ids=["ours", "field", "twice", "type"],
)
def test_the_server_reads_our_config_up_to_the_missing_backend(repository, tmp_path, old, new, error):
    """The server of nvidia-pytriton has no onnxruntime backend; it looks for one only if nothing is wrong with the config."""
    shutil.copytree(repository, tmp_path / "models")
    config = tmp_path / "models" / NAME / "config.pbtxt"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new, 1))
    (tmp_path / "backends").mkdir()
    server, _ = start(tmp_path / "models", tmp_path / "backends", tmp_path / "log")
    try:
        assert server.wait(120) != 0
    finally:
        server.kill()
    assert error in (tmp_path / "log").read_text()

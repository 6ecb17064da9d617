"""Peak memory of loading, above what the process held before, compared with the size of the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.checkpoints.stored import INDEX

SIZE = {"d_model": 512, "d_ff": 2048, "vocab_size": 8192}
ATTENTION = {"heads": 4, "head_dim": 128}
FOLDERS = {
    "samba": ("lit_gpt", "(mamba swa)*2", {"swa": {**ATTENTION, "kv_heads": 2}}, {"tie_embeddings": True}),
    "samba.pth": ("lit_gpt", "(mamba swa)*2", {"swa": {**ATTENTION, "kv_heads": 2}}, {"tie_embeddings": True}),
    "qwen3_next in shards": (
        "qwen3_next",
        "gdn*3 attn",
        {
            "gdn": {"heads": 4, "head_dim": 128, "expand_v": 1, "value_heads": 12, "norm_eps": 1e-6},
            "attn": {**ATTENTION, "gate": True, "qk_norm": "centred", "rotary": 0.25},
        },
        {"norm": "centred"},
    ),
    "llama": ("llama", "attn*4", {"attn": ATTENTION}, {}),
    "our own": (None, "jet*2 attn", {}, {}),
}
LOAD = """
import json, re, sys, torch, zoo
from zoo import create, load
from pathlib import Path

def peak():  # bytes
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def taken(folder, dtype):
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = peak()
    model = load(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.count_nonzero()
    return peak() - before

load(sys.argv[1])  # imports on first use
print(json.dumps([[taken(folder, None), taken(folder, torch.bfloat16)] for folder in sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (model_type, layers, blocks, fields) in FOLDERS.items():
        made[name] = tmp_path_factory.mktemp("memory") / "x"
        upstream = {"upstream": {"model_type": model_type}} if model_type else {}
        model = zoo.create({"name": "x", "layers": layers, "blocks": blocks, **SIZE, **fields, **upstream})
        zoo.save(model, made[name], format="hf" if model_type else "zoo")
        whole = made[name] / "model.safetensors"
        if name.endswith((".pth", "shards")):
            tensors = {tensor: value.clone() for tensor, value in load_file(whole).items()}
            whole.unlink()
            if name.endswith(".pth"):
                torch.save({"model": tensors}, made[name] / "x.pth")
            else:
                places = {tensor: f"model-{i % 3 + 1}-of-3.safetensors" for i, tensor in enumerate(tensors)}
                for shard in set(places.values()):
                    save_file({tensor: tensors[tensor] for tensor, place in places.items() if place == shard}, made[name] / shard)
                (made[name] / INDEX).write_text(json.dumps({"weight_map": places}))
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_more_than_the_checkpoint(folders: dict[str, Path]) -> None:
    ran = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders.values())], capture_output=True, text=True, check=True)
    for (name, folder), (as_stored, converted) in zip(folders.items(), json.loads(ran.stdout), strict=True):
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert size > 60e6
        assert as_stored < 1.15 * size, name
        assert converted < 0.75 * size, name  # half as wide, and never all of both copies at once

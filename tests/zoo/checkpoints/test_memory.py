"""Peak memory of loading, above what the process held before, compared with the size of the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tests.zoo.checkpoints.test_upstream import ORACLES
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
"""
ALL = (
    LOAD
    + """
print(json.dumps([[taken(folder, None), taken(folder, torch.bfloat16)] for folder in sys.argv[1:]]))
"""
)
LAST = (
    LOAD
    + """
import time

started = time.perf_counter()
bytes = taken(sys.argv[2], None)
print(json.dumps([time.perf_counter() - started, bytes]))
"""
)


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
    ran = subprocess.run([sys.executable, "-c", ALL, *map(str, folders.values())], capture_output=True, text=True, check=True)
    for (name, folder), (as_stored, converted) in zip(folders.items(), json.loads(ran.stdout), strict=True):
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert size > 60e6
        assert as_stored < 1.15 * size, name
        assert converted < 0.75 * size, name  # half as wide, and never all of both copies at once


LAYERS, EXPERTS, D_MODEL, WIDTH, SHARDS = 48, 512, 112, 64, 8


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 folder with the tensors of Qwen3-Next-80B-A3B, 112 instead of 2048 wide: 74 thousand of them, 1.1 GB."""
    folder = tmp_path_factory.mktemp("experts") / "x"
    moe = {"experts": EXPERTS, "top_k": 10, "width": WIDTH, "shared": WIDTH, "shared_gate": True}
    gdn, attn = FOLDERS["qwen3_next in shards"][2].values()
    model = zoo.create(
        {
            **{"name": "x", "layers": f"(gdn*3 attn)*{LAYERS // 4}", "blocks": {"gdn": gdn, "attn": attn}, "norm": "centred"},
            **{"d_model": D_MODEL, "d_ff": WIDTH, "vocab_size": 8192, "mlp": "moe", "mlps": {"moe": moe}},
            "upstream": {"model_type": "qwen3_next"},
        },
        dtype="bfloat16",
    )
    zoo.save(model, folder, format="hf")
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    step = -(-len(names) // SHARDS)
    places = {}
    for shard in range(SHARDS):
        own = names[shard * step : (shard + 1) * step]
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: tensors[name].bfloat16() for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_thousands_of_experts(many_experts: Path) -> None:
    """Less than a minute, and no second copy of the experts.

    Mapped pages of the files count as memory here, and so do the names and shapes of all tensors: about 0.1 GB at any width.
    """
    names = json.loads((many_experts / INDEX).read_text())["weight_map"]
    assert {f"model.layers.47.mlp.experts.511.{name}_proj.weight" for name in ("gate", "up", "down")} <= names.keys()
    assert len(names) > 3 * LAYERS * EXPERTS
    size = sum(file.stat().st_size for file in many_experts.glob("*.safetensors"))
    assert 1e9 < size < 1.2e9
    command = [sys.executable, "-c", LAST, str(ORACLES / "gdn-qwen3next-moe-a"), str(many_experts)]
    seconds, taken = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert seconds < 60
    assert taken < 1.15 * size

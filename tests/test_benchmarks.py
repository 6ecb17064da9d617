"""The CPU benchmarks: what is timed, what counts as right, and what a table says. Toy contenders; nothing here compares times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code, *arguments, **options):
    """Return what a new process at the top of this tree prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


@pytest.mark.parametrize("package", ["ours", "transformers"])
def test_a_load_is_measured_without_imports(tmp_path, package):
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    code = """
import sys
from benchmarks import loading
measured, seen = loading.peak_memory, []
loading.peak_memory = lambda: seen.append(set(sys.modules)) or measured()
loading.load(*sys.argv[1:])
before, after = seen
print(*sorted(after - before))
"""
    result, imported = python(code, package, tmp_path).splitlines()
    assert json.loads(result).keys() == {"seconds", "bytes", "sum"}
    assert imported == ""


LLAMA = """
import ctypes, sys
from unittest.mock import MagicMock
sys.modules["llama_cpp"] = MagicMock(
    llama_decode=lambda context, batch: 0,
    llama_vocab_n_tokens=lambda vocabulary: 4,
    llama_get_logits_ith=lambda context, end: (ctypes.c_float * 4)(),
)
"""


def test_the_process_of_llama_imports_neither_torch_nor_this_library(tmp_path):
    pytest.importorskip("transformers")
    from benchmarks.opening import THEIRS

    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){THEIRS}print(*sys.modules)"
    imported = {name.partition(".")[0] for name in python(code, "file.gguf", 1).split()}
    assert {"llama_cpp", "numpy"} <= imported
    assert not imported & {"torch", "zoo", "transformers"}

"""Models stored in 32, 8 and 4 bits: as our bundles of the ort dialect, and as files of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

import zoo
from benchmarks import gguf_files, llama
from zoo.export.bundle import export
from zoo.export.plan import Plan

FORMS: dict[str, Literal["int8", "int4"] | None] = {"F32": None, "Q8_0": "int8", "Q4_0": "int4"}
"""A form of llama.cpp, and the weights of an export that correspond to it."""


def write(model: zoo.Model, folder: Path, forms: Iterable[str], length: int) -> None:
    """Write a bundle `folder`/FORM for streams of `length` tokens and, where llama.cpp is installed, `folder`/FORM.gguf."""
    for form in forms:
        export(model, folder / form, plan=Plan(dialect="ort", weights=FORMS[form], max_length=length), verified=False)
    if llama.INSTALLED:
        gguf_files.write_gguf(model, folder / "F32.gguf")
        for form in set(forms) - {"F32"}:
            llama.quantise(folder / "F32.gguf", folder / f"{form}.gguf", form)


def in_llama(folder: Path, form: str, streams: int, length: int) -> llama.Llama | None:
    """Open a file that `write` wrote; None where llama.cpp is not installed."""
    file = folder / f"{form}.gguf"
    return llama.Llama(file, streams, context=length, threads=torch.get_num_threads()) if llama.INSTALLED else None

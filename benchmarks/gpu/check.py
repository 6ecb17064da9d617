"""Check rows of tuned.json: python -m benchmarks.gpu.check '[ROW, ...]'; writes one JSON object for each to stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import tests.kernels.interpreter  # noqa: F401  repairs the interpreter before any kernel is decorated

from benchmarks.gpu.sheet import poisoned
from zoo.doctor import check
from zoo.kernels import tuning

HEADS = {
    "gated_delta_rule": {"H": 16, "HV": 16},
    "gdn_step": {"H": 16, "HV": 16},
    "kda": {"H": 16},
    "ssd": {"H": 32},
    "selective_scan": {"D": 4096},
}
LENGTH = 208  # a multiple of 16, for which Triton compiles the code that is timed, with an incomplete last chunk
NARROW = {"T": 20, "H": 1, "HV": 1, "D": 32, "K": 32, "V": 32, "N": 16, "P": 16}


def sizes(row: tuning.Row, dry: bool) -> dict[str, int]:
    """Return the sizes of example inputs: those of the row, and heads of a model; interpreted, few tokens and heads."""
    operator = row["kernel"].split(".")[0]
    if not dry:
        return HEADS.get(operator, {}) | row["shape"]
    known = {"gated_delta_rule": "T H HV K V", "gdn_step": "T H HV K V", "kda": "T H K V", "ssd": "T H P N", "selective_scan": "T D N"}
    return {name: NARROW[name] for name in known.get(operator, "T").split()} | row["shape"]


def answer(row: tuning.Row) -> dict[str, Any]:
    operator, dtype = row["kernel"].split(".")[0], getattr(torch, row["dtype"])
    dry = not torch.cuda.is_available()
    device = torch.device("cpu" if dry else "cuda")
    if row["config"]:
        with tuning.forced(row):
            found = check(operator, device, dtype, {"T": LENGTH} | sizes(row, dry), "triton", row)
    else:
        found = check(operator, device, dtype, sizes(row, dry) if dry else {}, "triton")
    why = {"note": found.problem} if found.problem else {}
    return {"error": None if found.problem else found.error, "allowed": found.allowed, "right": found.right, **why}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to stdout, too
    for row in json.loads(sys.argv[1]):
        found = answer(row)
        print(json.dumps(found), file=answers, flush=True)
        if poisoned(RuntimeError(found.get("note", ""))):
            return


if __name__ == "__main__":
    main()

"""Documentation of one bundle for users without Python: `python -m zoo.export.page DIR > page.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.errors import ZooError, counted
from zoo.export.manifest import (
    CODA,
    CONSOLIDATION,
    HEAD,
    PASS,
    PREDICTION,
    PREFILL,
    PRELUDE,
    SLEEPING,
    WEIGHTS,
    Bundle,
    GraphSpec,
    TensorSpec,
)

PURPOSE = {
    PREDICTION: "one wake pass over one token",
    PREFILL: "one wake pass over up to {pieces}",
    HEAD: "logits of all tokens of a piece, from `hidden` of `prefill.onnx`, for hosts that need more than those of the last",
    CONSOLIDATION: "one whole sleep: {passes} over a window of up to {tokens}, then eviction",
    SLEEPING: "all of these for one stream, of any number of `tokens`: it sleeps by itself, and the host only carries its states",
    PRELUDE: "start of a sleep, run once before the passes",
    PASS: "one pass of a sleep, which makes {loops}",
    CODA: "end of a sleep, run once after the passes",
}
MEANING = {
    "input_ids": ("token ids; with `n_valid`, the first `n_valid` of each row are valid", "one call"),
    "position": ("position of the first token in each stream, under `hard` in its window", "one call"),
    "position_ids": ("position of each token; only the first column is read, in `prefill.onnx` its first row", "one call"),
    "n_valid": ("number of valid tokens; the rest is padding at the end, any tokens", "one call"),
    "logits": ("logits of the token after the last valid one; in `head.onnx`, of the token after each", "one call"),
    "hidden": ("hidden states after the last block", "one call"),
    "h": ("hidden states after the previous pass", "one sleep"),
    "h_out": ("hidden states, `h` of the next pass", "one sleep"),
    "first": ("hidden states before the first pass", "one sleep"),
    "pass": ("index of the pass, from 0", "one call"),
    "recurrent_state": ("fast weights", "the stream"),
    "conv_state": ("latest inputs of a short convolution", "until a sleep evicts it"),
    "ids": ("token ids of the window", "until a sleep"),
    "length": ("number of tokens in the window", "until a sleep"),
    "offset": ("position of the first token of the window in the stream", "until a sleep"),
    "key": ("ring: position p is stored in slot p mod {window}", "until a sleep evicts it"),
    "value": ("ring, as `key`", "until a sleep evicts it"),
}


def page(bundle: Bundle) -> str:
    """Return Markdown with every tensor of every graph and the loop that runs them."""
    words: dict[str, Any] = {"loops": bundle.loops, "window": bundle.window, "passes": counted(bundle.loops, "pass")}
    words |= {"tokens": counted(bundle.window, "token"), "pieces": counted(bundle.plan.prefill or 1, "token")}
    graphs = "\n".join(f"| `{name}` | {PURPOSE[name].format(**words)} |" for name in bundle.graphs)
    tables = "\n".join(f"## {name}\n\n{_tensors(spec, words)}" for name, spec in bundle.graphs.items())
    sleep = f"window {bundle.window}, {counted(bundle.loops, 'pass')} per sleep, eviction `{bundle.evict}`"
    return f"""# {bundle.config.name} without Python

Generated from `bundle.json` by `python -m zoo.export.page DIR`; do not edit.
Opset {bundle.opset}, {bundle.precision}, dialect `{bundle.plan.dialect}`, {sleep}.

| file | contents |
|---|---|
{graphs}
| `{WEIGHTS}` | weights, the external data of every graph; keep it in the same folder |
| `bundle.json` | config, tensors, versions, sha256 of every file |

`batch` is the number of streams; it is the same in every tensor.
In `prediction.onnx` each stream is at its own position; in the other graphs they are all at the same one.
States go in as `past_key_values.*` and come out as `present.*`, with the same shape and type.
No graph modifies its inputs.
A stream starts with zero states at position 0.
Token ids are 0 to {bundle.config.vocab_size - 1}, and there is at least one.
{_refusals(bundle)}

## The loop

{_loop(bundle)}
{tables}"""


def _refusals(bundle: Bundle) -> str:
    alone = f"`{SLEEPING}` refuses both, and no tokens. " if SLEEPING in bundle.graphs else ""
    return (
        "onnxruntime on a CPU refuses larger ids, but counts negative ones from the end of the vocabulary, as ONNX's Gather does. "
        f"{alone}On a GPU nothing is refused, so a host should check its tokens."
    )


def _tensors(spec: GraphSpec, words: dict[str, Any]) -> str:
    rows = ["| input | output | shape | type | contents | lifetime |", "|---|---|---|---|---|---|"]
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    for tensor in spec.inputs:
        after = outputs.pop(tensor.name.replace("past_key_values", "present"), None) if "past_key_values" in tensor.name else None
        rows.append(_row(tensor, f"`{tensor.name}`", f"`{after.name}`" if after else "", words))
    rows += [_row(tensor, "", f"`{tensor.name}`", words) for tensor in outputs.values()]
    return "\n".join(rows) + "\n"


def _row(tensor: TensorSpec, before: str, after: str, words: dict[str, Any]) -> str:
    what, lives = MEANING[tensor.name.rpartition(".")[2]]
    what, lives = (f"{what}, at the start of the window", "until a sleep") if ".start." in tensor.name else (what, lives)
    return f"| {before} | {after} | {tensor.shape} | {tensor.dtype} | {what.format(**words)} | {lives} |".replace("'", "")


def _loop(bundle: Bundle) -> str:
    return "```\n" + "\n".join(_lines(bundle)) + "\n```\n"


def _lines(bundle: Bundle) -> Iterator[str]:
    L, prefill = bundle.window, bundle.plan.prefill
    sleeps = any(name in bundle.graphs for name in (CONSOLIDATION, PASS))
    yield "states = zeros; position = 0" + ("; window = []; start_states = states; start_position = 0" if sleeps else "")
    yield ""
    yield "feed(tokens):"
    yield "    while tokens remain:"
    if sleeps:
        yield f"        if length(window) == {L}: sleep()"
        room = f"{L} - length(window)"
    else:
        yield f"        if position == {L}: stop  # the maximum length of a stream in this bundle"
        room = f"{L} - position"
    if prefill:
        yield f"        piece = next tokens, at most {prefill} and at most {room}"
        yield f"        logits, states = prefill(input_ids = piece padded to {prefill}, n_valid = length(piece), position, states)"
        yield "        # for a short piece, one token at a time is as fast: prediction(input_ids = token, position, states)"
    else:
        yield "        piece = next token"
        yield "        logits, states = prediction(input_ids = piece, position, states)"
    yield "        position += length(piece)" + ("; window += piece" if sleeps else "")
    yield "    choose the next token from the last logits"
    if not sleeps:
        return
    position = "" if bundle.evict == "hard" else ", position = start_position"
    given = f"n_valid = length(window){position}"
    yield ""
    yield "sleep():                      # may also be called earlier, for example while the stream is idle"
    if CONSOLIDATION in bundle.graphs:
        yield f"    states = consolidation(input_ids = window padded to {L}, {given}, start_states)"
    else:
        yield f"    first, states of the prelude = prelude(input_ids = window padded to {L}, {given}, start_states)"
        yield "    h = first"
        yield f"    for n in 0 .. {bundle.loops - 1}:          # any number of passes is allowed"
        yield f"        h, states of the span = pass(pass = n, h, first, {given}, fast weights of the previous pass, other start_states)"
        if CODA in bundle.graphs:
            yield f"    states of the coda = coda(h, {given}, start_states)"
    yield "    position = " + ("0" if bundle.evict == "hard" else "start_position + length(window)")
    yield "    start_states = states; start_position = position; window = []"
    if SLEEPING in bundle.graphs:
        yield ""
        yield "or, from zero states:"
        yield "    logits, states = sleeping(input_ids = tokens, states)"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m zoo.export.page DIR")
    try:
        print(page(Bundle.read(Path(sys.argv[1]))), end="")
    except ZooError as error:
        sys.exit(f"Error: {error}")

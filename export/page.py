"""A page for people who run a bundle without Python, made from its bundle.json: `python -m zoo.export.page DIR > page.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from zoo.export.manifest import CODA, CONSOLIDATION, PASS, PREDICTION, PREFILL, PRELUDE, WEIGHTS, Bundle, GraphSpec, TensorSpec

PURPOSE = {
    PREDICTION: "one wake pass over one token",
    PREFILL: "one wake pass over a piece of at most {prefill} tokens",
    CONSOLIDATION: "one whole sleep: {loops} passes over a window of at most {window} tokens, then eviction",
    PRELUDE: "what a sleep does once, before its passes",
    PASS: "one of the {loops} passes of a sleep",
    CODA: "what a sleep does once, after its passes",
}
MEANING = {
    "input_ids": ("tokens, the first `n_valid` of them count", "one call"),
    "position": ("of the first token: in the window under `hard`, else in the stream", "one call"),
    "position_ids": ("of each token, as `position`; the first of them counts", "one call"),
    "n_valid": ("tokens that count; the rest is padding at the end, of any value", "one call"),
    "logits": ("of the token after each", "one call"),
    "h": ("hidden states: those of the last pass", "one sleep"),
    "h_out": ("hidden states: `h` of the next pass", "one sleep"),
    "first": ("hidden states before the first pass", "one sleep"),
    "pass": ("0 for the first", "one call"),
    "recurrent_state": ("fast weights", "the stream"),
    "conv_state": ("newest inputs of a short convolution", "until a sleep evicts it"),
    "key": ("ring: position p lies in slot p mod {window}", "until a sleep evicts it"),
    "value": ("ring, as `key`", "until a sleep evicts it"),
}


def page(bundle: Bundle) -> str:
    """Markdown: every tensor of every graph, and the loop that runs them."""
    words = {"prefill": bundle.plan.prefill, "loops": bundle.loops, "window": bundle.window}
    graphs = "\n".join(f"| `{name}` | {PURPOSE[name].format(**words)} |" for name in bundle.graphs)
    tables = "\n".join(f"## {name}\n\n{_tensors(spec, words)}" for name, spec in bundle.graphs.items())
    return f"""# {bundle.config.name} without Python

Made from `bundle.json` by `python -m zoo.export.page DIR`; do not edit. Opset {bundle.opset}, {bundle.precision}, dialect
`{bundle.plan.dialect}`, window {bundle.window}, {bundle.loops} passes of sleep, eviction `{bundle.evict}`.

| file | what it is |
|---|---|
{graphs}
| `{WEIGHTS}` | the weights, external data of every graph: keep it beside them |
| `bundle.json` | config, tensors, versions, sha256 of every file |

`batch` streams advance together, each dimension of that name is the same number. Every state goes in as `past_key_values.*` and
comes out as `present.*`, of the same shape and type; a graph changes nothing in place. A stream begins with zeros at position 0.

## The loop

{_loop(bundle)}
{tables}"""


def _tensors(spec: GraphSpec, words: dict[str, int | None]) -> str:
    rows = ["| in | out | shape | type | what | lives |", "|---|---|---|---|---|---|"]
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    for tensor in spec.inputs:
        after = outputs.pop(tensor.name.replace("past_key_values", "present"), None) if "past_key_values" in tensor.name else None
        rows.append(_row(tensor, f"`{tensor.name}`", f"`{after.name}`" if after else "", words))
    rows += [_row(tensor, "", f"`{tensor.name}`", words) for tensor in outputs.values()]
    return "\n".join(rows) + "\n"


def _row(tensor: TensorSpec, before: str, after: str, words: dict[str, int | None]) -> str:
    what, lives = MEANING[tensor.name.rpartition(".")[2]]
    return f"| {before} | {after} | {tensor.shape} | {tensor.dtype} | {what.format(**words)} | {lives} |".replace("'", "")


def _loop(bundle: Bundle) -> str:
    return "```\n" + "\n".join(_lines(bundle)) + "\n```\n"


def _lines(bundle: Bundle) -> Iterator[str]:
    L, prefill = bundle.window, bundle.plan.prefill
    sleeps = any(name in bundle.graphs for name in (CONSOLIDATION, PASS))
    yield "states = zeros; position = 0" + ("; window = []; start_states = states; start_position = 0" if sleeps else "")
    yield ""
    yield "feed(tokens):"
    yield "    while tokens are left:"
    if sleeps:
        yield f"        if length(window) == {L}: sleep()"
        room = f"{L} - length(window)"
    else:
        yield f"        if position == {L}: stop; the stream is as long as this bundle allows"
        room = f"{L} - position"
    if prefill:
        yield f"        piece = at most {prefill} of the tokens left, and at most {room}"
        yield f"        logits, states = prefill(input_ids = piece padded to {prefill}, n_valid = length(piece), position, states)"
        yield "        # or, token by token, as cheap where the piece is short: prediction(input_ids = token, position, states)"
    else:
        yield "        piece = the next token"
        yield "        logits, states = prediction(input_ids = piece, position, states)"
    yield "        position += length(piece)" + ("; window += piece" if sleeps else "")
    yield "    the next token is chosen from the logits after the last one"
    if not sleeps:
        return
    position = "" if bundle.evict == "hard" else ", position = start_position"
    given = f"n_valid = length(window){position}"
    yield ""
    yield "sleep():                      # also at any earlier time, for example when nobody waits"
    if CONSOLIDATION in bundle.graphs:
        yield f"    states = consolidation(input_ids = window padded to {L}, {given}, start_states)"
    else:
        yield f"    first, states of the prelude = prelude(input_ids = window padded to {L}, {given}, start_states)"
        yield "    h = first"
        yield f"    for n in 0 .. {bundle.loops - 1}:          # another number of passes is allowed"
        yield f"        h, states of the span = pass(pass = n, h, first, {given}, fast weights of the last pass, other start_states)"
        if CODA in bundle.graphs:
            yield f"    states of the coda = coda(h, {given}, start_states)"
    yield "    position = " + ("0" if bundle.evict == "hard" else "start_position + length(window)")
    yield "    start_states = states; start_position = position; window = []"


if __name__ == "__main__":
    print(page(Bundle.read(Path(sys.argv[1]))), end="")

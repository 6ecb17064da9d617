"""The tables of an ablation: runs.csv, and Markdown that is readable as plain text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from zoo.costs import count
from zoo.training.plan import Arm, Matching, Run, format_value

Results = Mapping[Run, dict[str, Any]]
"""Finished runs, with what `zoo.training.evaluate.evaluate` returned for each."""


def csv_rows(match: Matching, results: Results) -> Iterator[dict[str, Any]]:
    """Yield the rows of runs.csv: one per run for all levels together, one per level, and for texts one per eighth of a window."""
    paths = list(dict.fromkeys(path for run in results for path in run.arm.fields))
    for run, found in results.items():
        costs, settings = run.arm.costs, run.config.model_dump()
        row = {
            "match": str(match),
            "arm": run.arm.name,
            **{path: format_value(_at(settings, path)) for path in paths},
            "seed": run.seed,
            "steps": run.steps,
            "tokens": run.steps * costs.tokens,
            "flops": run.flops,
            "parameters": costs.parameters,
            "flops_awake": costs.awake,
            "best_guess": found["chance"],
        }
        at_test = {f"accuracy_at_N={n}": accuracy for n, accuracy in found.get("test_loops", {}).items()}
        measured = {name: found[name] for name in ("loss", "accuracy", "exact", "first", "wrong_window")}
        yield {**row, "level": "all", **measured, **at_test}
        for level, accuracy in found["by_level"].items():
            measured = {"loss": found["loss_by_level"][level], "accuracy": accuracy, "first": found["first_by_level"].get(level)}
            yield {**row, "level": level, **measured, "majority": found["majority_by_level"].get(level)}
        for eighth, loss in found.get("loss_by_eighth", {}).items():
            yield {**row, "level": f"eighth {eighth} of a window", "loss": loss}


def markdown(match: Matching, results: Results, arms: Sequence[Arm], reference: str, seeds: Sequence[int]) -> str:
    """Return a Markdown table with a row per arm: costs, then mean and range of the accuracy over its seeds."""
    some = next(iter(results.values()))
    trained = [str(seed) for seed in seeds if any(run.seed == seed for run in results)]
    levels = sorted(set(itertools.chain(*(found["by_level"] for found in results.values()))))
    in_bits = some.get("bits_per_byte") is not None
    header = ["arm", "parameters", "steps", "tokens", "FLOPs", "FLOPs per token awake", "right", *(["bits per byte"] if in_bits else [])]
    unit = " (bits per byte)" if in_bits else ""
    header += [f"{level_label(level, some['level_name'])}{unit}" for level in levels if len(levels) > 1]
    header += ["first answer", "wrong window"] if some["wrong_window"] is not None else []
    header += [f"right at N = {n}" for n in some.get("test_loops", ())]
    header += ["whole sequences"] if some["exact_chance"] is not None else []
    rows = [[*header, "best guess"]]
    for arm in arms:
        done = {run: found for run, found in results.items() if run.arm is arm}
        if done:
            rows.append(_row(arm, done, seeds, levels, whole=some["exact_chance"] is not None))
    by_first = f", by {some['level_name']} only the first of each sequence" if len(levels) > 1 and first_answers_tell(some) else ""
    lines = [
        f"## {_amount(match)} as {reference}",
        "",
        *aligned(rows),
        "",
        f"{some['answers']:,} held-out answers per run{by_first}; mean (range) over seeds {', '.join(trained)}; torch {torch.__version__}.",
        "",
    ]
    return "\n".join(lines)


def _row(arm: Arm, done: Results, seeds: Sequence[int], levels: Sequence[int], *, whole: bool) -> list[str]:
    steps, found = next(iter(done)).steps, list(done.values())
    name = arm.name if len(done) == len(seeds) else f"{arm.name} ({len(done)} of {len(seeds)} seeds)"
    row = [name, count(arm.costs.parameters), f"{steps:,}", count(steps * arm.costs.tokens), count(arm.flops(steps))]
    row.append(count(arm.costs.awake))
    row.append(mean_and_range([one["accuracy"] for one in found]))
    if found[0].get("bits_per_byte") is not None:
        row.append(_bits([one["loss"] for one in found]))
        row += [_bits([one["loss_by_level"].get(level) for one in found]) for level in levels if len(levels) > 1]
    else:
        row += [mean_and_range([accuracy_by_level(one).get(level) for one in found]) for level in levels if len(levels) > 1]
    if found[0]["wrong_window"] is not None:
        row += [mean_and_range([one[name] for one in found]) for name in ("first", "wrong_window")]
    row += [mean_and_range([one["test_loops"][n] for one in found]) for n in found[0].get("test_loops", ())]
    row += [mean_and_range([one["exact"] for one in found])] if whole else []
    return [*row, f"{found[0]['chance']:.1%}" + (f", whole {found[0]['exact_chance']:.2%}" if whole else "")]


def _amount(match: Matching) -> str:
    what = "tokens" if match.match == "tokens" else "training FLOPs"
    return f"The same {what}" if match.times == 1 else f"{match.times} times as many {what}"


def first_answers_tell(found: Mapping[str, Any]) -> bool:
    """Return True if earlier answers may give later ones away, and first answers exist at every level."""
    return found["wrong_window"] is not None and found["first_by_level"].keys() == found["by_level"].keys()


def accuracy_by_level(found: Mapping[str, Any]) -> dict[int, float]:
    """Return the accuracy of first answers by level where these are the meaningful measure, else that of all answers."""
    chosen: dict[int, float] = found["first_by_level" if first_answers_tell(found) else "by_level"]
    return chosen


def mean_and_range(values: Sequence[float | None]) -> str:
    """Return "93.0% (91.2-95.1)", or the one value alone."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{fmean(known):.1%}" + (f" ({100 * min(known):.1f}-{100 * max(known):.1f})" if len(known) > 1 else "")


def _bits(losses: Sequence[float | None]) -> str:
    """Return the mean of losses in bits, and their range."""
    known = [loss / math.log(2) for loss in losses if loss is not None]
    if not known:
        return ""
    return f"{fmean(known):.3f}" + (f" ({min(known):.3f}-{max(known):.3f})" if len(known) > 1 else "")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table: names to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *cells = (cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        lines.append(f"| {' | '.join([first, *cells])} |")
    rule = "|".join("-" * (widths[0] + 2) if not i else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return [lines[0], f"|{rule}|", *lines[1:]]


def level_label(level: int, name: str) -> str:
    """Return "1 hop", "2 hops", or "window 2" if the name of the levels is not a plural."""
    noun, space, rest = name.partition(" ")
    if not noun.endswith("s"):
        return f"{name} {level}"
    return f"{level} {noun.removesuffix('s') if level == 1 else noun}{space}{rest}"


def _at(settings: Any, path: str) -> Any:
    """Return the value at a dotted path, or None."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings

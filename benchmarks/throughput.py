"""Training throughput with windows, without them, and with N passes of sleep (figure 6 of arXiv 2605.26099).

    python -m benchmarks.throughput [--tokens 512] [--width 128] [--batch 2]

Forward and backward over sequences whose last eighth carries loss, except its first token, which is not predicted after a sleep.
`windows` drops each window before reading the next, with N = 1; `sliding` keeps the newest L - 1 tokens; `parallel` computes the
same as `sliding` with sliding-window attention over the whole sequence at once; `everything` uses full attention. The plot is
docs/throughput.png.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor

import zoo
from benchmarks.measure import OURS, PLOTS, compare, record

LOOPS = (1, 2, 4, 8)


def step(model: zoo.Model, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the loss after a forward and a backward pass."""
    model.zero_grad()
    loss = model.loss(ids, mask)
    loss.backward()
    return loss.detach()


@click.command()
@click.option("--tokens", default=512, show_default=True, help="Tokens per sequence.")
@click.option("--width", default=128, show_default=True, help="Width of the model, gdn4.")
@click.option("--batch", default=2, show_default=True, help="Sequences per batch.")
@click.option("--rounds", default=5, show_default=True)
def main(tokens: int, width: int, batch: int, rounds: int) -> None:
    ids = torch.randint(256, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(tokens) > tokens - tokens // 8).repeat(batch, 1)

    def trained(name: str, **fields: Any) -> partial[Tensor]:
        return partial(step, zoo.create(name, d_model=width, vocab_size=256, **fields), ids, mask)

    rows = []
    for L in (tokens // 8, tokens // 4, tokens // 2):
        contenders = {
            OURS: trained(f"gdn4-slide{L}"),
            "parallel": trained("gdn4-full", layers="(swa gdn)*2", blocks={"attn": {}, "swa": {"heads": 4, "window": L}}),
            "windows": trained(f"gdn4-hard{L}"),
            "everything": trained("gdn4-full"),
        }
        same, apart = (contenders[name]().item() for name in (OURS, "parallel"))
        assert abs(same - apart) < 1e-4, f"sliding and parallel should compute the same; losses {same} and {apart}"
        rows.append(compare(f"L = {L}, N = 1, {batch} x {tokens}", contenders, rounds=rounds, unit="us", per=ids.numel()) | {"L": L})
    L = tokens // 8
    contenders = {OURS if n == 1 else f"N = {n}": trained(f"gdn4-sleep{n}-hard{L}") for n in LOOPS}
    rows.append(compare(f"L = {L}, N, {batch} x {tokens}", contenders, rounds=rounds, unit="us", per=ids.numel()))
    record("throughput", rows)
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_window, by_loops = figure.subplots(1, 2)
    *windowed, looped = rows
    for name in windowed[0]["times"]:
        label = "sliding windows" if name == OURS else name
        by_window.errorbar(
            *_speeds([row["L"] for row in windowed], [row["times"][name] for row in windowed]), fmt="o-", capsize=3, label=label
        )
    by_loops.errorbar(*_speeds(LOOPS, list(looped["times"].values())), fmt="o-", capsize=3)
    by_window.set(xlabel="L, tokens of a window", title="N = 1", ylabel="training tokens / s", xticks=[row["L"] for row in windowed])
    by_loops.set(xlabel="N, passes of sleep", title=looped["case"].split(",")[0], xticks=LOOPS)
    for axes in (by_window, by_loops):
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    by_window.legend(frameon=False, fontsize=8)
    figure.savefig(PLOTS / "throughput.png", dpi=120)


def _speeds(at: Any, times: list[list[float]]) -> tuple[Any, list[float], list[list[float]]]:
    """Convert quartiles of microseconds per token to median tokens per second and error bars."""
    speeds = [1e6 / middle for _, middle, _ in times]
    return at, speeds, [[1e6 / m - 1e6 / high for _, m, high in times], [1e6 / low - 1e6 / m for low, m, _ in times]]


if __name__ == "__main__":
    main()

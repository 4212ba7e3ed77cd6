"""A picture of a run: how many times faster than eager and than torch.compile each line is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

_BARS = (("eager", "eager_ratio", 0.2, "#9aa5b1"), ("torch.compile", "compile_ratio", -0.2, "#1f6f8b"))
_LABEL = {"fontsize": 7}


def save(path: Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Write a bar chart (the suffix says the kind: .png, .svg, .pdf); forward + backward where there is one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    shown = _whole(rows)[::-1]  # the first line on top
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for label, name, offset, color in _BARS:
        bars = [(place + offset, getattr(row, name)) for place, row in enumerate(shown) if getattr(row, name)]
        for height, ratio in bars:
            axes.annotate(f" {ratio.median:.2g}x", (max(ratio.p80, 1), height), va="center", **_LABEL)
        axes.barh(
            [height for height, _ in bars],
            [ratio.median - 1 for _, ratio in bars],
            0.38,
            left=1,
            xerr=[[r.median - r.p20 for _, r in bars], [r.p80 - r.median for _, r in bars]],
            color=color,
            ecolor="#444444",
            label=label,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.6, len(shown) - 0.4)
    names = [f"{row.op}  {row.dtype}\n{row.size}, {row.backend}" for row in shown]
    axes.set_yticks(range(len(shown)), names, **_LABEL)
    axes.set_xlabel("time of the alternative over the fused op's (bar: median, whiskers: p20 to p80)")
    figure.suptitle(
        f"{machine['device']['name']}, torch {machine['versions']['torch']}", fontsize=10, x=0.02, ha="left"
    )
    figure.legend(title="times faster than", loc="outside upper right", ncols=2, **_LABEL)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rows with the backward, and the forward of ops that have none."""
    have_backward = {row.key[:-1] for row in rows if row.what != "forward"}
    return [row for row in rows if row.what != "forward" or row.key[:-1] not in have_backward]

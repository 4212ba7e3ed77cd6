"""The pictures of the page; no global matplotlib state is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dmdr_fast.eval.claims.records import Record
from dmdr_fast.eval.claims.runs import Task
from dmdr_fast.eval.claims.statistics import MEASURES, spread, spread_of
from dmdr_fast.eval.claims.verdicts import Claim

_COLOURS = ("#2f6fb3", "#d1652a", "#3d8f5a", "#8a5aa8")
_INK, _GRID = "#444444", "#e3e3e3"
_AXES = {m: heading for m, (heading, *_) in MEASURES.items()} | {
    "step": "generator updates",
    "reward": "optimised reward",
}


def draw_all(task: Task, claims: Sequence[Claim], records: Sequence[Record], folder: Path) -> None:
    """One PNG per figure of the claims, into ``folder``; of claims that share one the first says what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    for claim in {claim.figure: claim for claim in reversed(claims)}.values():
        _draw(task, claim, records).savefig(folder / f"{claim.figure}.png", dpi=110, metadata={"Software": None})


def _draw(task: Task, claim: Claim, records: Sequence[Record]) -> Figure:
    names = claim.drawn or [name for name in claim.rows if not name.startswith("cold_")]
    titles = {name: task.titles[name] for name in (*names, "teacher")}
    measures = claim.measures or (task.reward, "held_out_reward")
    since_rl = not all(name.startswith("cold_") for name in names)
    figure, axes = _figure(len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        if claim.measures:
            _against_updates(axis, records, titles, measure, since_rl=since_rl)
        else:
            _one_against_other(axis, records, titles, "fd", measure)
    return figure


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4.6 * panels, 3.3), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(True, color=_GRID, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", labelsize=8, colors=_INK)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _against_updates(
    axis: Axes, records: Sequence[Record], titles: dict[str, str], measure: str, *, since_rl: bool
) -> None:
    """Mean over seeds of a measure at each evaluation, with a band of one standard deviation."""
    for colour, name in zip(_COLOURS, titles, strict=False):
        by_step: dict[float, list[float]] = {}
        for record in records:
            way = record.since_rl if since_rl else record.evaluations
            for row in way if record.name == name else ():
                step, value = row["step"], row.get(measure)
                if step is not None and value is not None:
                    by_step.setdefault(step, []).append(value)
        if not by_step:
            continue
        steps = sorted(by_step)
        found = [f for s in steps if (f := spread(by_step[s])) is not None]
        means, stds = [f.mean for f in found], [0.0 if math.isnan(f.std) else f.std for f in found]
        axis.plot(steps, means, color=colour, linewidth=1.6, label=titles[name])
        low = [m - s for m, s in zip(means, stds, strict=True)]
        if measure == "fd":  # on a logarithmic axis
            low = [max(value, m / 10) for value, m in zip(low, means, strict=True)]
        axis.fill_between(
            steps, low, [m + s for m, s in zip(means, stds, strict=True)], color=colour, alpha=0.18, linewidth=0
        )
    if measure == "fd":
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    level = spread_of(records, "teacher", measure)
    if level is not None:
        axis.axhline(level.mean, color=_INK, linewidth=1, linestyle=":", label=titles["teacher"])
    _label(axis, "step", measure)


def _one_against_other(axis: Axes, records: Sequence[Record], titles: dict[str, str], x: str, y: str) -> None:
    """The end of every run as a point, and its way there since RL started as a thin line."""
    for colour, name in zip(_COLOURS, titles, strict=False):
        mine = [r for r in records if r.name == name and r.final.get(x) is not None and r.final.get(y) is not None]
        for record in mine:
            way = record.since_rl
            axis.plot([row[x] for row in way], [row[y] for row in way], color=colour, linewidth=0.8, alpha=0.5)
        if mine:
            label = titles[name]
            axis.scatter([r.final[x] for r in mine], [r.final[y] for r in mine], s=22, color=colour, label=label)
    teacher = spread_of(records, "teacher", x), spread_of(records, "teacher", y)
    if teacher[0] is not None and teacher[1] is not None:
        axis.scatter([teacher[0].mean], [teacher[1].mean], s=60, color=_INK, marker="*", label=titles["teacher"])
    if x == "fd":
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
    _label(axis, x, y)


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 3, 5 of each decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(_AXES[x], fontsize=9, color=_INK)
    axis.set_ylabel(_AXES[y], fontsize=9, color=_INK)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7.5, frameon=False, labelcolor=_INK)

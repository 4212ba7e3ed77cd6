"""The pictures of the page; no global matplotlib state is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dmdr_fast.eval.claims.records import Record
from dmdr_fast.eval.claims.runs import TITLES
from dmdr_fast.eval.claims.statistics import spread, spread_of

_COLOURS = ("#2f6fb3", "#d1652a", "#3d8f5a", "#8a5aa8")
_INK, _GRID = "#444444", "#e3e3e3"
_AXES = {
    "step": "generator updates",
    "fd": "FD",
    "recall": "recall",
    "reward": "optimised reward",
    "held_out_reward": "held-out reward",
    "diversity": "diversity",
}


def draw_all(records: Sequence[Record], folder: Path) -> None:
    """One PNG per figure of the claims, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in _FIGURES.items():
        draw(records).savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


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
    axis: Axes, records: Sequence[Record], names: Sequence[str], measure: str, *, since_rl: bool
) -> None:
    """Mean over seeds of a measure at each evaluation, with a band of one standard deviation."""
    for colour, name in zip(_COLOURS, names, strict=False):
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
        axis.plot(steps, means, color=colour, linewidth=1.6, label=TITLES[name])
        low = [m - s for m, s in zip(means, stds, strict=True)]
        if measure == "fd":  # on a logarithmic axis
            low = [max(value, m / 10) for value, m in zip(low, means, strict=True)]
        axis.fill_between(
            steps, low, [m + s for m, s in zip(means, stds, strict=True)], color=colour, alpha=0.18, linewidth=0
        )
    if measure == "fd":
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    _teacher_level(axis, records, measure)
    _label(axis, "step", measure)


def _teacher_level(axis: Axes, records: Sequence[Record], measure: str) -> None:
    level = spread_of(records, "teacher", measure)
    if level is not None:
        axis.axhline(level.mean, color=_INK, linewidth=1, linestyle=":", label=TITLES["teacher"])


def _one_against_other(axis: Axes, records: Sequence[Record], names: Sequence[str], x: str, y: str) -> None:
    """The end of every run as a point, and its way there since RL started as a thin line."""
    for colour, name in zip(_COLOURS, names, strict=False):
        mine = [r for r in records if r.name == name and r.final.get(x) is not None and r.final.get(y) is not None]
        for record in mine:
            way = record.since_rl
            axis.plot([row[x] for row in way], [row[y] for row in way], color=colour, linewidth=0.8, alpha=0.5)
        if mine:
            label = TITLES[name]
            axis.scatter([r.final[x] for r in mine], [r.final[y] for r in mine], s=22, color=colour, label=label)
    teacher = spread_of(records, "teacher", x), spread_of(records, "teacher", y)
    if teacher[0] is not None and teacher[1] is not None:
        axis.scatter([teacher[0].mean], [teacher[1].mean], s=60, color=_INK, marker="*", label=TITLES["teacher"])
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


def _cold_start(records: Sequence[Record]) -> Figure:
    figure, (axis,) = _figure(1)
    _against_updates(
        axis, records, ("cold_start", "cold_no_dyna_dg", "cold_no_dyna_rs", "cold_neither"), "fd", since_rl=False
    )
    return figure


def _reward_and_fd(*names: str) -> Callable[[Sequence[Record]], Figure]:
    """The optimised and the held-out reward against FD, from the start of RL on."""

    def draw(records: Sequence[Record]) -> Figure:
        figure, axes = _figure(2)
        for axis, reward in zip(axes, ("reward", "held_out_reward"), strict=True):
            _one_against_other(axis, records, names, "fd", reward)
        return figure

    return draw


def _updates(names: Sequence[str], *measures: str) -> Callable[[Sequence[Record]], Figure]:
    """Each measure against updates, from the start of RL on."""

    def draw(records: Sequence[Record]) -> Figure:
        figure, axes = _figure(len(measures))
        for axis, measure in zip(axes, measures, strict=True):
            _against_updates(axis, records, names, measure, since_rl=True)
        return figure

    return draw


_METHODS = ("dmdr_refl", "dmdr_grpo", "dmdr_dpo", "dmd_only")
_FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "regularizer": _reward_and_fd("dmdr_refl", "dmd_then_rl_kl", "rl_kl", "rl_only"),
    "modes": _updates(_METHODS, "recall", "diversity"),
    "cold_start": _cold_start,
    "joint": _reward_and_fd("dmdr_refl", "dmd_then_rl"),
    "teacher": _reward_and_fd("dmdr_refl", "dmdr_grpo", "dmdr_dpo"),
    "reuse": _reward_and_fd("dmdr_refl", "dmdr_reuse", "dmdr_reuse_time"),
    "methods": _updates(_METHODS, "reward", "held_out_reward"),
    "tilt": _reward_and_fd("dmdr_refl", "dmdr_tilt"),
    "nft": _updates(("dmdr_nft", "dmdr_grpo", "dmd_only"), "reward", "held_out_reward"),
    "hybrid": _reward_and_fd("dmdr_hybrid_two", "dmdr_refl_two", "dmdr_grpo_two"),
}

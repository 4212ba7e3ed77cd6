"""The figures of a run: curves of the log, and the overview. No global matplotlib state is touched."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = ("#2f6fb3", "#d1652a", "#3d8f5a", "#8a5aa8", "#777777")
_INK, _GRID = "#444444", "#e3e3e3"
_SMOOTHED_FROM = 80  # points from which a curve gets a running mean drawn over it


@dataclass(frozen=True)
class Curve:
    """One panel: (steps, values) by name, in ``unit``; ``reference`` (name, value) is drawn as a level."""

    title: str
    unit: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]
    reference: tuple[str, float] | None = None


def draw_curve(curve: Curve, *, boundary: int | None) -> bytes:
    """The panel as PNG; ``boundary`` is the step at which the cold start ends, marked by a line."""
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, (steps, values)) in zip(_cycled(len(curve.series)), curve.series.items(), strict=True):
        if len(values) >= _SMOOTHED_FROM:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(*_running_mean(steps, values, len(values) // 40), color=colour, linewidth=1.6, label=name)
        else:
            marker = "o" if len(values) == 1 else None
            axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, label=name)
    if _spans_decades(curve):
        axes.set_yscale("log")
    if curve.reference is not None:
        name, level = curve.reference
        axes.axhline(level, color=_INK, linewidth=1, linestyle=":", label=name)
    if boundary is not None:
        axes.axvline(boundary, color=_INK, linewidth=1, linestyle="--")
        axes.annotate(
            "RL starts",
            (boundary, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_INK,
        )
    _finish_axes(axes, curve)
    return _png(figure)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _running_mean(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over ``width`` neighbours (fewer at the ends), at the same steps; gaps (nan) are skipped."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.minimum(np.arange(len(values)) + width // 2 + 1, len(values))
    first = np.maximum(np.arange(len(values)) - width // 2, 0)
    return steps, (total[last] - total[first]) / (last - first)


def _spans_decades(curve: Curve) -> bool:
    """A log scale is apt where all that is drawn is positive and spans more than a factor of 20."""
    values = np.concatenate([v[np.isfinite(v)] for _, v in curve.series.values()])
    return len(values) > 0 and values.min() > 0 and values.max() > 20 * values.min()


def _finish_axes(axes, curve: Curve) -> None:
    axes.set_title(curve.title, fontsize=10.5, loc="left", color="#222222", pad=16)  # room for the boundary's label
    axes.set_xlabel("generator step", fontsize=8.5, color=_INK)
    axes.set_ylabel(curve.unit, fontsize=8.5, color=_INK)
    axes.tick_params(which="both", labelsize=8, colors=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curve.series) > 1 or curve.reference is not None:
        axes.legend(fontsize=8, frameon=False, labelcolor=_INK)


def draw_overview(panels: list[tuple[str, str, np.ndarray]]) -> bytes:
    """Sheets side by side as PNG: ``panels`` are (title above, line below, sheet uint8 [H, W, C])."""
    height, width = panels[0][2].shape[:2]
    figure = Figure(figsize=(3.2 * len(panels), 3.2 * height / width + 0.7), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    for axes, (title, below, image) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=12, color="#222222")
        axes.set_xlabel(below, fontsize=11, color=_INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()

"""The pictures of a run: sheets of samples and curves of the log. No global matplotlib state is touched."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

ROWS, COLUMNS = 10, 8  # at most, of a sample sheet
_CELL, _GAP = 48, 4  # pixels: least side of an image in a sheet, space between two
_LARGEST_CELL = 160
_COLOURS = ("#2f6fb3", "#d1652a", "#3d8f5a", "#8a5aa8", "#777777")
_INK, _GRID = "#444444", "#e3e3e3"
_SMOOTHED_FROM = 80  # points from which a curve gets a running mean drawn over it


def sample_order(labels: np.ndarray) -> tuple[np.ndarray, list[int] | None]:
    """Which samples a sheet shows, and where: (indices int [rows, columns], the class of each row or None).

    One class per row where the first ten classes have two samples or more each, else a square of the first.
    """
    classes, counts = np.unique(labels, return_counts=True)
    classes, counts = classes[:ROWS], counts[:ROWS]
    columns = min(int(counts.min()), COLUMNS)
    if columns >= 2:
        return np.stack([np.flatnonzero(labels == c)[:columns] for c in classes]), classes.tolist()
    side = min(int(len(labels) ** 0.5), COLUMNS)
    return np.arange(side * side).reshape(side, side), None


def sheet(samples: np.ndarray, order: np.ndarray) -> np.ndarray:
    """``samples`` [n, C, h, w] in [-1, 1] placed as ``order`` says, on white: uint8 [H, W, C].

    Small images are enlarged by a whole factor with sharp pixels, large ones reduced.
    """
    rows, columns = order.shape
    cells = [[_cell(samples[index]) for index in row] for row in order]
    height, width, channels = cells[0][0].shape
    page = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels), 255, dtype=np.uint8)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            top, left = i * (height + _GAP), j * (width + _GAP)
            page[top : top + height, left : left + width] = cell
    return page


def _cell(image: np.ndarray) -> np.ndarray:
    pixels = np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    longest = max(pixels.shape[:2])
    if longest > _LARGEST_CELL:
        size = [max(1, side * _LARGEST_CELL // longest) for side in pixels.shape[1::-1]]
        small = Image.fromarray(pixels.squeeze()).resize(size, Image.Resampling.LANCZOS)
        return np.asarray(small).reshape(size[1], size[0], -1)
    factor = max(1, -(-_CELL // longest))
    return pixels.repeat(factor, 0).repeat(factor, 1)


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


def image_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as the ``src`` of an ``<img>`` that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

"""The table at the end of a run, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Row
from benchmarks.timing import Spread

_HEAD = (
    "op",
    "size",
    "dtype",
    "pass",
    "backend",
    "ms",
    "p20..p80",
    "GB/s",
    "% copy",
    "kernels %",
    "x eager",
    "x compile",
    "peak MiB",
    "host",
)
_GPU_HEAD = (*_HEAD, "launches")
_LEFT = 5  # columns of words; numbers follow
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def table(rows: Sequence[Row]) -> list[str]:
    """One line per row; peak and launches as fused / eager / compile."""
    on_gpu = any(row.launches for row in rows)
    cells = [_cells(row) for row in rows]
    head = _GPU_HEAD if on_gpu else _HEAD
    return _aligned([head, *(line[: len(head)] for line in cells)], _LEFT)


def legend() -> list[str]:
    """What the columns mean."""
    return [
        "ms: median of the fused op over the rounds. x eager, x compile: their time over the fused op's, median of",
        "the rounds' own ratios; under 1 the fused op is the slower one. GB/s: the floor's bytes (each large tensor",
        "read once and written once) over the median. % copy: that against a copy timed in the same rounds. kernels %:",
        "on a CPU the same by the time in the kernels alone, as all times on a GPU are. peak MiB: held at most above",
        "the inputs, fused / eager / torch.compile. Every line passed the float64 gate first.",
        "host: what the call takes of the host on a GPU, in multiples of a + b of two small tensors, measured over a",
        "driver that runs nothing (tests/kernels/host); on a GPU make gpu-check measures it.",
        "On a CPU freed memory stays with the process, so that nothing timed takes its memory from the system anew.",
    ]


def slower(rows: Sequence[Row]) -> list[str]:
    """The lines on which an alternative was faster, and why where that is known."""
    lines = []
    for row in rows:
        for name, ratio in (("eager", row.eager_ratio), ("torch.compile", row.compile_ratio)):
            if ratio is not None and ratio.median < 1:
                why = f": {row.note}" if row.note else ""
                lines.append(f"slower than {name} ({ratio.median:.2f}x): {', '.join(row.key)}{why}")
    return lines


def missing(rows: Sequence[Row]) -> list[str]:
    """Alternatives that could not run, each reason once."""
    return list(dict.fromkeys(row.missing for row in rows if row.missing))


def heading(machine: dict[str, Any]) -> list[str]:
    """Device, versions, commit and date in two lines."""
    device = ", ".join(
        f"{value}" if key in ("kind", "name") else f"{key} {value}" for key, value in machine["device"].items()
    )
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    commit = machine["commit"][:12] or "no commit"
    changed = " with changes" if machine["uncommitted_changes"] else ""
    return [
        f"{device}; load at the start {machine['load']:.1f}",
        f"{versions}; {commit}{changed}; {machine['date']}",
    ]


def _cells(row: Row) -> tuple[str, ...]:
    seconds = row.times["fused"]
    rate = row.traffic / seconds.median
    return (
        row.op,
        row.size,
        _SHORT.get(row.dtype, row.dtype),
        row.what.replace("forward + backward", "fwd+bwd"),
        row.backend,
        _milliseconds(seconds.median),
        f"{_milliseconds(seconds.p20)}..{_milliseconds(seconds.p80)}",
        f"{rate / 1e9:.1f}" if row.traffic else "",
        f"{100 * rate / row.copy_rate:.0f}" if row.traffic else "",
        f"{100 * row.traffic / row.kernels / row.copy_rate:.0f}" if row.traffic and row.kernels else "",
        _times(row.eager_ratio),
        _times(row.compile_ratio),
        " / ".join(_mebibytes(row.peak[name]) for name in ("fused", "eager", "compile") if name in row.peak),
        "" if row.host is None else f"{row.host:.0f}",
        " / ".join(str(row.launches[name]) for name in ("fused", "eager", "compile") if name in row.launches),
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g}" if size < 1000 << 20 else f"{size / 2**20:.0f}"


def _times(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}"


def _aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]

"""The tables of the page, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dmdr_fast.eval.claims.records import Record
from dmdr_fast.eval.claims.runs import Task
from dmdr_fast.eval.claims.statistics import COLD_START_FD, MEASURES, Spread, spread_of
from dmdr_fast.eval.claims.verdicts import FD_BOUND, Goal, Outcome


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """The value to so many digits, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def cell(found: Spread | None, digits: int) -> str:
    """``mean ± standard deviation``; the mean alone where there is a single value or one teacher."""
    if found is None:
        return "–"
    mean = number(found.mean, digits)
    return mean if found.count == 1 or found.std == 0.0 else f"{mean} ± {number(found.std, digits)}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column flush left and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results(task: Task, records: Sequence[Record], names: Sequence[str], *, cold_start: bool = False) -> str:
    """Mean and spread over seeds of each measure; with ``cold_start`` the mean of log10 FD on the way as well."""
    measures = (*task.columns, COLD_START_FD) if cold_start else task.columns
    rows = []
    for name in names:
        diverged = sum(r.diverged is not None for r in records if r.name == name)
        title = task.titles[name] + (f" ({diverged} diverged)" if diverged else "")
        rows.append([title, *(cell(spread_of(records, name, m), MEASURES[m][1]) for m in measures)])
    return markdown(["", *(MEASURES[m][0] for m in measures)], rows)


def outcomes(task: Task, found: Sequence[Outcome]) -> str:
    """One line per test: what was compared, the difference, its standard error, what that says."""
    rows = []
    for o in found:
        heading, digits, more = MEASURES[o.test.measure]
        relation = ("not lower" if more else "not higher") if o.test.guard else ("higher" if more else "lower")
        rows.append(
            [
                f"{heading} of {task.titles[o.test.first]} {relation} than of {task.titles[o.test.second]}",
                number(o.difference, digits, sign=True),
                number(o.error, digits),
                o.says,
            ]
        )
    return markdown(["test", "difference", "standard error", "says"], rows)


def goals(task: Task, found: Sequence[Goal]) -> str:
    """One line per method: reward beside the teacher's, FD over the teacher's, and by how much it misses."""
    heading, digits, _ = MEASURES[task.reward]
    rows = []
    for goal in found:
        missed = []
        if goal.reward_gain <= 0:
            missed.append(f"{heading} by {number(abs(goal.reward_gain), digits)}")
        if goal.fd_ratio >= FD_BOUND:
            missed.append(f"FD by {number(goal.fd_ratio - FD_BOUND, 2)} x the teacher's")
        rows.append(
            [
                task.titles[goal.name],
                number(goal.reward_gain, digits, sign=True),
                f"{goal.fd_ratio:.2f} x",
                "met" if goal.met else "missed: " + ", ".join(missed),
            ]
        )
    header = ["", f"{heading} less the teacher's", "FD over the teacher's", f"goal (> 0, < {FD_BOUND:g} x)"]
    return markdown(header, rows)

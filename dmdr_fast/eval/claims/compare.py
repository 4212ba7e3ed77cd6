"""Whether runs that were made again gave the committed numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmdr_fast.eval.claims.records import Record


def differences(committed: Record, again: Record) -> list[str]:
    """What is not exactly the same, one line each; [] where every number is.

    The final row and every evaluation are compared; of the teacher only what both runs measured.
    """
    lines = _row("settings", committed.settings, again.settings)
    lines += _row("run", {"diverged": committed.diverged}, {"diverged": again.diverged})
    for row in sorted(committed.rows.keys() | again.rows.keys()):
        lines += _row(row, committed.rows.get(row, {}), again.rows.get(row, {}))
    old, new = ({e["step"] or 0: e for e in record.evaluations} for record in (committed, again))
    for step in sorted(old.keys() | new.keys()):
        lines += _row(f"evaluation at {step:g}", old.get(step, {}), new.get(step, {}))
    return lines


def _row(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return [f"{name}, {k}: {old.get(k)!r} committed, {new.get(k)!r} now" for k in keys]


def report(committed: Sequence[Record], again: Sequence[Record]) -> bool:
    """Print one line per run, and what differs below it; True where nothing does."""
    known = {(r.name, r.seed): r for r in committed}
    same = True
    for record in again:
        old = known.get((record.name, record.seed))
        lines = ["not in the committed file"] if old is None else differences(old, record)
        same = same and not lines
        print(f"{record.name}, seed {record.seed}: " + ("differs" if lines else "every number is the committed one"))
        for line in lines[:20]:
            print(f"  {line}")
        if old is not None and lines and old.commit != record.commit:
            print(f"  committed by {old.commit}, made again by {record.commit}")
    return same

"""Files of results, and the comparison of a run with one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gate import GateError
from benchmarks.measure import Row
from benchmarks.timing import Spread

FORMAT = 1
SLOWER = 1.05  # the largest ratio to the file that passes


class RecordError(ValueError):
    """A file of results that cannot be read, or compared with this run."""


def save(path: Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Write ``rows`` and what they were measured on as JSON."""
    record = {"format": FORMAT, **machine, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add a JSON line per row: what a run that is cut short has measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """(rows, the rest) of a file that :func:`save` wrote."""
    try:
        record = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: not a file of results ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f"{path}: expected results of format {FORMAT}; write it anew with --bench-json")
    return [_row(entry) for entry in record.pop("rows")], record


def check_same_device(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Times of two machines say nothing about the code."""
    if then["device"] != now["device"]:
        raise RecordError(
            f"{path}: measured on {then['device']}, this is {now['device']}: compare on the same device "
            "(and number of threads), or write a new file with --bench-json"
        )


def regressions(rows: Sequence[Row], before: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(lines that got more than 5 % slower, notes) of ``rows`` against a file's.

    What is compared is the time relative to eager's, of rounds in which both ran: a busy or slower-clocked machine
    slows both. A line fails where the median of that is more than 5 % above the file's and the middle 60 % of the two
    runs' rounds do not overlap: on a quiet machine 5 % is then the limit, on a noisy one a difference must show above
    the noise. A new torch may change eager's own time: write the file anew after an update.
    """
    known = {row.key: row for row in before}
    slower, notes = [], []
    for row in rows:
        old = known.pop(row.key, None)
        name = ", ".join(row.key)
        if old is None:
            notes.append(f"{name}: not in the file")
            continue
        change = old.eager_ratio.median / row.eager_ratio.median
        apart = row.eager_ratio.p80 < old.eager_ratio.p20
        line = f"{name}: {row.eager_ratio.median:.2f}x eager, was {old.eager_ratio.median:.2f}x"
        if change > SLOWER and apart:
            slower.append(f"{line}: {100 * (change - 1):.0f} % slower")
        elif change > SLOWER:
            notes.append(f"{line}: within the noise of the rounds")
    notes += [f"{', '.join(key)}: in the file, not in this run" for key in known]
    return slower, notes


def settled(measure: Callable[[], list[Row]], before: Sequence[Row]) -> list[Row]:
    """What ``measure`` returns; a second time where a line of the first got slower: a busy moment passes."""
    rows = measure()
    return measure() if regressions(rows, before)[0] else rows


def _row(entry: dict[str, Any]) -> Row:
    spreads = {name: _spread(entry[name]) for name in ("eager_ratio", "compile_ratio")}
    times = {name: Spread(**spread) for name, spread in entry["times"].items()}
    errors = {name: GateError(**error) for name, error in entry["errors"].items()}
    return Row(**{**entry, **spreads, "times": times, "errors": errors})


def _spread(entry: dict[str, float] | None) -> Spread | None:
    return None if entry is None else Spread(**entry)

"""What is kept of a finished run, and the page's JSON, which holds nothing else than that and how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmdr_fast.errors import UserError

FINAL = "dmdr"  # the row of metrics.json of the generator as it ends, whatever the run was


@dataclass(frozen=True)
class Record:
    """One finished run.

    rows: metrics.json by generator. evaluations: one row per ``eval.every`` updates, those of the run that it started
    from included. seconds: of the process, over all its parts. diverged: the trainer's message where it gave up.
    """

    name: str
    seed: int
    settings: dict[str, Any]
    rows: dict[str, dict[str, float | None]]
    evaluations: list[dict[str, float | None]]
    seconds: float
    commit: str
    diverged: str | None = None

    @property
    def final(self) -> dict[str, float | None]:
        """The row of the generator as the run left it; empty where it diverged."""
        return self.rows.get(FINAL, {})

    @property
    def since_rl(self) -> list[dict[str, float | None]]:
        """The evaluations from the end of the cold start on; without one, from the teacher's own single step on."""
        start = self.settings["train.cold_start_steps"]
        rows = [row for row in self.evaluations if row["step"] >= start]
        return rows if start or "cold_start" not in self.rows else [{"step": 0, **self.rows["cold_start"]}, *rows]


def read_evaluations(folder: Path) -> list[dict[str, float | None]]:
    """``evaluations.jsonl`` of a run folder, by rising step; [] without one."""
    path = folder / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def read_rows(folder: Path) -> dict[str, dict[str, float | None]]:
    """``metrics.json`` of a run folder."""
    return json.loads((folder / "metrics.json").read_text())


def write_json(path: Path, made: dict[str, Any], records: list[Record], verdicts: list[dict[str, Any]]) -> None:
    """All data of the page, one run a line: how it was made, every run, every verdict with its numbers."""

    def lines(rows: list[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]"

    runs = lines([asdict(r) for r in records])
    path.write_text(
        f'{{"made": {json.dumps(made, allow_nan=False)},\n"runs": {runs},\n"claims": {lines(verdicts)}}}\n',
        encoding="utf-8",
    )


def read_json(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """(how it was made, the runs) of a file that :func:`write_json` wrote.

    Raises:
        UserError: no such file, or not one of these.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["made"], [Record(**run) for run in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a claims.json that this command wrote, got {error!r}") from error

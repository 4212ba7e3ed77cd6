"""Means, spreads and differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmdr_fast.eval.claims.records import Record
from dmdr_fast.eval.claims.runs import BASE

COLD_START_FD = "cold_start_fd"
MATCHED_FD = "matched_fd"
# measure: (heading, digits after the point, whether more is better)
MEASURES = {
    "fd": ("FD", 3, False),
    "precision": ("precision", 3, True),
    "recall": ("recall", 3, True),
    "reward": ("reward", 4, True),
    "accuracy": ("prompt accuracy", 3, True),
    "accuracy_unseen": ("of unseen", 3, True),
    "held_out_reward": ("held-out reward", 4, True),
    "diversity": ("diversity", 4, True),
    COLD_START_FD: ("log10 FD over the cold start", 3, False),
    MATCHED_FD: ("FD at the same reward", 3, False),
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; nan for a single value) of n numbers."""

    mean: float
    std: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """The :class:`Spread` of the values, None of none at all."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, math.nan, 1)
    return Spread(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


def difference(a: Spread, b: Spread) -> tuple[float, float]:
    """mean(a) - mean(b) of two independent sets of runs, and its standard error sqrt(s_a^2 / n_a + s_b^2 / n_b).

    The error is nan where one of them has a single run.
    """
    return a.mean - b.mean, math.sqrt(a.std**2 / a.count + b.std**2 / b.count)


def values_of(records: Sequence[Record], name: str, measure: str) -> list[float]:
    """One value per seed of a variant, or of ``teacher``/``teacher_n``; seeds without one are left out."""
    if name.startswith("teacher"):
        found = [r.rows[name].get(measure) for r in records if r.name == BASE and name in r.rows]
    else:
        found = [value_of(r, measure) for r in records if r.name == name]
    return [v for v in found if v is not None]


def value_of(record: Record, measure: str) -> float | None:
    """The measure of one run; of the cold start the mean of log10 FD over its evaluations, as of equal weight.

    An FD that was not finite is left out.
    """
    if measure != COLD_START_FD:
        return record.final.get(measure)
    logs = [math.log10(fd) for row in record.evaluations if (fd := row.get("fd")) is not None]
    return math.fsum(logs) / len(logs) if logs else None


def spread_of(records: Sequence[Record], name: str, measure: str) -> Spread | None:
    """The :class:`Spread` over seeds. The teacher is one network on one noise: its spread is 0, not unknown."""
    found = spread(values_of(records, name, measure))
    if found is not None and name.startswith("teacher"):
        return Spread(found.mean, 0.0, found.count)
    return found


def pair_of(
    records: Sequence[Record], first: str, second: str, measure: str, reward: str
) -> tuple[Spread | None, Spread | None]:
    """What a test compares: the measure of both; for :data:`MATCHED_FD` the second's FD at the first's final reward."""
    if measure != MATCHED_FD:
        return spread_of(records, first, measure), spread_of(records, second, measure)
    finals = {r.seed: at for r in records if r.name == first and (at := r.final.get(reward)) is not None}
    matched = [fd_at(r, reward, finals[r.seed]) for r in records if r.name == second and r.seed in finals]
    return spread_of(records, first, "fd"), spread([fd for fd in matched if fd is not None])


def fd_at(record: Record, reward: str, value: float) -> float | None:
    """FD where the run, on its way since RL started, first has that reward; at its highest reward if it never has.

    Between evaluations log FD is linear in the reward. A run that starts above the reward has it at its start. An
    evaluation without one of the two, such as one whose FD was not finite, is passed over.
    """
    measured = [(row.get(reward), row.get("fd")) for row in record.since_rl]
    way = [(at, fd) for at, fd in measured if at is not None and fd is not None]
    if not way:
        return None
    before, fd_before = way[0]
    for at, fd in way:
        if at >= value:
            share = 1.0 if at == before else (value - before) / (at - before)
            return fd_before ** (1 - share) * fd**share
        before, fd_before = at, fd
    return max(way)[1]

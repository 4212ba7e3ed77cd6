"""What a task's page is made of: its kinds of run, their settings and their budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmdr_fast.cli import CONFIGS
from dmdr_fast.errors import UserError

BASE = "cold_start"  # the run that others start from, where they begin with the same updates


@dataclass(frozen=True)
class Budget:
    """Generator updates of the cold start and in all, between evaluations, and what else every run is told.

    only: the runs that are made; all of the task's where it is empty.
    """

    cold_start: int
    total: int
    evaluate_every: int
    settings: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One kind of run. ``phases``: cold_start ends with it; both goes on with RL; rl has no cold start.

    settings: keys of the configuration, on top of the recipe file. after: the run whose last checkpoint it starts
    from; its first updates are those of that run, to the byte. longer: times the budget's updates.
    """

    name: str
    title: str
    phases: str = "both"
    settings: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    longer: float = 1.0


@dataclass(frozen=True)
class Task:
    """A world that the claims are judged in: the recipe ``configs/NAME.yaml`` and what its page holds.

    Attributes:
        page: name of the page, its data and its folder of pictures.
        steps: of the student.
        rewards: kinds of the optimised and of the held-out reward.
        full, quick: the page's budget and that of a smoke test.
        columns: measures of the tables.
        reward: the measure that tests take for the reward.
        words: of the page, by the names in its texts.
    """

    name: str
    page: str
    steps: int
    rewards: tuple[str, str]
    full: Budget
    quick: Budget
    variants: tuple[Variant, ...]
    columns: tuple[str, ...]
    reward: str
    words: dict[str, str]

    @property
    def recipe(self) -> Path:
        """What all runs share."""
        return CONFIGS / f"{self.name}.yaml"

    @property
    def titles(self) -> dict[str, str]:
        """How a reader knows a kind of run, or the teacher."""
        few = f"Teacher, {self.steps} step{'s' * (self.steps != 1)}"
        return {v.name: v.title for v in self.variants} | {"teacher": "Teacher, 50 steps", "teacher_n": few}


def settings_of(task: Task, variant: Variant, seed: int, budget: Budget) -> dict[str, Any]:
    """Everything that a run of this variant sets on top of the recipe file, by dotted key."""
    cold, total = {
        "cold_start": (budget.cold_start, budget.cold_start),
        "both": (budget.cold_start, budget.total),
        "rl": (0, budget.total),
    }[variant.phases]
    terms, held_out = ([{"kind": kind}] for kind in task.rewards)
    return {
        "seed": seed,
        "train.cold_start_steps": round(cold * variant.longer),
        "train.generator_steps": round(total * variant.longer),
        "reward.terms": terms,
        "reward.held_out": held_out,
        "eval.every": budget.evaluate_every,
        # The teacher is the same in all runs: its many steps are taken once a seed.
        **({} if variant.name == BASE else {"eval.teacher_steps": 1}),
        **budget.settings,
        **variant.settings,
    }


def chosen(task: Task, names: Sequence[str]) -> tuple[Variant, ...]:
    """The named variants and the runs that they start from, in the table's order; all where none is named.

    Raises:
        UserError: a name that is not in the table.
    """
    known = {v.name: v for v in task.variants}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such run; expected one of {', '.join(known)}")
    wanted = set(names or known) | {known[n].after for n in names if known[n].after}
    return tuple(v for v in task.variants if v.name in wanted)

"""Malformed inputs: each is refused in one line or gives what it should, and nothing that was there is lost.

    python -m tests.malformed --count 200        # a tally per kind; exit code 1 where an input did neither

A kind is a module of this package with ``cases(count)``, listed in :data:`KINDS`: cases by hand, then drawn ones.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from dmdr_fast.errors import UserError

KINDS = ("configuration", "command_line", "deepspeed_json", "weights", "checkpoints", "prompts", "images", "planner")
LONGEST = 6000  # characters of a message: some of the inputs themselves have 5000


@dataclass(frozen=True)
class Case:
    """One input. ``attempt`` gets an empty folder and raises a UserError where it refuses what it is given.

    ``expected`` of drawn ones is mostly "either": that no third thing happens is what is looked at.
    """

    name: str
    attempt: Callable[[Path], object]
    expected: Literal["refused", "accepted", "either"] = "refused"


def cases(kind: str, count: int) -> Iterator[Case]:
    """The cases of a kind, with ``count`` drawn ones."""
    yield from importlib.import_module(f"{__name__}.{kind}").cases(count)


def verdict(case: Case, folder: Path) -> tuple[Literal["refused", "accepted", "fault"], str]:
    """What became of a case, in words."""
    try:
        case.attempt(folder)
        outcome, said = "accepted", "accepted"
    except UserError as error:
        outcome, said = "refused", " ".join(str(error).split())
        if not 0 < len(said) < LONGEST:
            return "fault", f"a message of {len(said)} characters: {said[:200]}"
    except BaseException as error:
        return "fault", f"{type(error).__name__}: {str(error)[:200]}"
    if case.expected not in (outcome, "either"):
        return "fault", f"expected to be {case.expected}: {said}"
    return outcome, said


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The working directory and the environment are those of a user in ``folder``; both are put back."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with patch.dict(os.environ):
            yield
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, to see what was lost."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def drawn(strategy: SearchStrategy, count: int) -> list[Any]:
    """``count`` values of a strategy, the same ones every time."""
    found: list[Any] = []
    if not count:
        return found

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found[:count]

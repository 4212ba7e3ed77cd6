"""What `make test` leaves to `make test-all`: the rest of a product of cases, and tests of minutes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], count: int = 1) -> list[Any]:
    """Cases to parametrize with, tuples for several names: the first ``count`` always run, the others thoroughly."""
    return [
        case if i < count else thorough(*(case if isinstance(case, tuple) else (case,))) for i, case in enumerate(cases)
    ]


def thorough(*values: Any) -> Any:
    """One case, of a value for each name."""
    return pytest.param(*values, marks=pytest.mark.thorough)

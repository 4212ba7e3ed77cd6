"""The reference's functions by raw name."""

from __future__ import annotations

from collections.abc import Callable

FUNCTIONS: dict[str, Callable] = {}


def implements(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function of a named tuple as the reference's ``name``."""

    def register(function: Callable) -> Callable:
        FUNCTIONS[name] = function
        return function

    return register

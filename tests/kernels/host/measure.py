"""Host time of every public op and raw operator on the Triton backend, in multiples of ``a + b`` of two small tensors.

``python -m tests.kernels.host.measure [op ...]`` writes what :func:`main` returns as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.host.driver import activate

_CALLS, _ROUNDS = 40, 9


def main(names: list[str]) -> dict[str, Any]:
    """Of the ops ``names``, or of all.

    Returns:
        ``unit``: microseconds of ``a + b``; ``ops``: by name ``forward`` and ``both`` (with the backward), ``launches``
        of the two and the names of the ``operators`` that run; ``operators``: by raw function, without gradients, the
        most of the ops that run it.
    """
    launched = activate()
    torch.set_num_threads(1)
    from dmdr_fast import backends
    from dmdr_fast.ops._library import RAW
    from tests.cases import host_calls

    unit, found = _Unit(), {"ops": {}, "operators": {}}
    run, arguments = backends.run, []
    for name, one in host_calls().items():
        if names and name not in names:
            continue
        forward, ran = one.call, {}
        backends.run = lambda raw, args, ran=ran: ran.setdefault(raw, args) and run(raw, args)
        both = with_backward(forward, one.wrt)
        both()
        backends.run = run
        arguments += ran.items()
        counts = []
        for call in (forward, both):
            call()
            before = launched()
            call()
            counts.append(launched() - before)
        times = {"forward": unit.of(forward), "both": unit.of(both)}
        found["ops"][name] = {**times, "launches": counts, "operators": sorted(ran)}
    with torch.no_grad():
        for raw, args in arguments:
            args = tuple(_own(arg) for arg in args)
            taken = unit.of(lambda operator=RAW[raw].operator, args=args: operator(*args))
            found["operators"][raw] = max(taken, found["operators"].get(raw, 0))
    return {"unit": unit.best, **found}


class _Unit:
    """Times calls and, in between, ``a + b``.

    Attributes:
        best: microseconds of ``a + b``.
    """

    def __init__(self) -> None:
        self._small, self.best = torch.randn(4, 4), float("inf")

    def of(self, call: Callable[[], object]) -> float:
        """The least time of a call over the least of ``a + b``, each of several rounds of this thread's own time."""
        small, best, unit = self._small, float("inf"), float("inf")
        call(), call()
        for _ in range(_ROUNDS):
            best = min(best, _microseconds(call))
            unit = min(unit, _microseconds(lambda: small + small))
        self.best = min(self.best, unit)
        return round(best / unit, 1)


def _microseconds(call: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    for _ in range(_CALLS):
        call()
    return (time.thread_time_ns() - start) / _CALLS / 1e3


def with_backward(forward: Callable[[], Any], wrt: list[Tensor]) -> Callable[[], object]:
    """``forward`` and the backward from ones to ``wrt``, where there are any."""

    def graded() -> list[Tensor]:
        out = forward()
        return [part for part in ((out,) if isinstance(out, Tensor) else out) if part.requires_grad]

    incoming = [torch.ones_like(part) for part in graded()]
    return (lambda: torch.autograd.grad(graded(), wrt, incoming)) if wrt else forward


def _own(arg: object) -> object:
    """Of the plain type that a caller of the operator passes."""
    if isinstance(arg, Tensor):
        return arg.detach()
    return int(arg) if isinstance(arg, int) and not isinstance(arg, bool) else arg


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))

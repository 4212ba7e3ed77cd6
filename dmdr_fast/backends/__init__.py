"""Which kernel runs: triton, cuda, cpu or reference, and why.

Every public op lowers to raw functions ``<op>_fwd`` / ``<op>_bwd``, defined in ``ops/`` by their formulas in plain
PyTorch, which ``reference`` runs. A backend (a module of this package, imported when an op first wants it; one that
cannot load raises ImportError with the reason) has those that it registers:

    @implements("gated_residual_fwd")
    def gated_residual_fwd(run: Recorder, a, out) -> None: ...

``a`` has the arguments by name; ``out`` the results, to be written: None in place of one that is not needed or 0.

``DMDR_FAST_BACKEND=auto|triton|cuda|cpu|reference`` picks one (default auto); ``DMDR_FAST_STRICT=1`` turns a
fallback to the reference into an error. Without it each reason for a fallback is logged once.
float64 always runs in the reference: the kernels compute in float32. That is not a fallback.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.backends.plans import Outputs, Plan, Recorder, on_device
from dmdr_fast.reference import RESULTS, first_tensor

_LOG = logging.getLogger("dmdr_fast")
_NAMES = ("auto", "triton", "cuda", "cpu", "reference")

# Raw functions for which a committed result in benchmarks/results shows the CUDA kernel right and faster than
# Triton's on the same machine; on all others Triton comes first.
CUDA_FIRST: frozenset[str] = frozenset()

# What the kernels are compiled for begins with this compute capability.
_OLDEST = (8, 0)

# DMDR_FAST_BACKEND as it stands is ``ENVIRONMENT.get(BACKEND)``: read at every call, since a test or a user may change
# it between two. os.environ itself decodes at every look, which takes four times as long.
ENVIRONMENT = vars(os.environ)["_data"]
BACKEND = os.environ.encodekey("DMDR_FAST_BACKEND")

_logged: set[tuple[str, str]] = set()


class FallbackError(RuntimeError):
    """DMDR_FAST_STRICT=1 is set and no kernel can run this call."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs a raw function, why, and which ones before it refused.

    Attributes:
        function: raw function, e.g. ``renoise_fwd``.
        backend: ``triton``, ``cuda``, ``cpu`` or ``reference``.
        reason: one sentence.
        refused: (backend, why not) of the backends that came first and could not.
    """

    function: str
    backend: str
    reason: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        refused = "".join(f"; not {name}: {why}" for name, why in self.refused)
        return f"{self.function}: {self.backend} ({self.reason}{refused})"


def at_most(most: float, unit: str, what: str, size: Callable[[Any], int]) -> Callable[[Any], str | None]:
    """Why a raw function does not take ``what`` (plural) of more ``unit`` than ``most``, of its arguments."""

    def refusal(a: Any) -> str | None:
        return None if size(a) <= most else f"it takes {what} of at most {most} {unit}, these have {size(a)}"

    return refusal


@functools.cache
def too_old(device: torch.device) -> str | None:
    """Why the device cannot run the kernels, None where it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= _OLDEST:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"its kernels need compute capability {_OLDEST[0]}.{_OLDEST[1]} or later, this device has {major}.{minor}"


class Backend:
    """The raw functions that one kind of kernel has.

    Args:
        recorder: makes the recorder that its functions take, from the call's arguments.
        takes_empty: its functions take tensors without elements; else the reference answers for them.
    """

    def __init__(self, recorder: Callable[[tuple], Recorder], *, takes_empty: bool = False) -> None:
        self.functions: dict[str, tuple[Callable, Callable[[Any], str | None] | None]] = {}
        self._recorder, self._takes_empty = recorder, takes_empty

    def implements(self, name: str, *, refuses: Callable[[Any], str | None] | None = None) -> Callable:
        """Register the decorated ``function(run, args, out)`` as this backend's ``name``.

        Args:
            refuses: of the arguments: why the function cannot run them, or None.
        """

        def register(function: Callable) -> Callable:
            self.functions[name] = function, refuses
            return function

        return register

    def refusal(self, name: str, args: tuple) -> str | None:
        """Why it cannot run ``name(*args)``; None where it can."""
        if name not in self.functions:
            return f"it has no {name}"
        why, (_, refuses) = too_old(first_tensor(args).device), self.functions[name]
        return refuses(args) if why is None and refuses is not None else why

    def run(self, name: str, args: tuple) -> tuple[Outputs, Plan | None]:
        """The results, and how to run such a call again; None where every call has to go this way."""
        if not self._takes_empty and any(isinstance(arg, Tensor) and arg.numel() == 0 for arg in args):
            return reference.run(name, args), None
        return on_device(first_tensor(args).device, self._run, name, args)

    def _run(self, name: str, args: tuple) -> tuple[Outputs, Plan | None]:
        run, results = self._recorder(args), RESULTS[name](args)
        made = tuple(run.result(result) for result in results)
        written = (None if one.shape is None or one.zero else made[index] for index, one in enumerate(results))
        self.functions[name][0](run, args, results._make(written))
        outputs = made if len(made) > 1 else made[0]
        return outputs, run.plan(outputs)


def run(name: str, args: tuple) -> tuple[Outputs, Plan | None]:
    """Run the raw function ``name`` on the backend that fits its arguments: (results, plan for such calls)."""
    backend, choice, fallen = _choose(name, args)
    if backend is not None:
        return backend.run(name, args)
    if fallen:
        _fall_back(name, choice.refused, first_tensor(args).device.type)
    return reference.run(name, args), None


def explain(name: str, args: tuple) -> Choice:
    """The choice that ``run(name, args)`` makes, with its reasons; runs nothing."""
    return _choose(name, args)[1]


@functools.cache
def load(backend: str) -> Backend | str:
    """The backend, or why it cannot be loaded."""
    try:
        return importlib.import_module(f"dmdr_fast.backends.{backend}").BACKEND
    except (ImportError, OSError) as error:
        return f"it cannot be loaded ({error})"


def _choose(name: str, args: tuple) -> tuple[Backend | None, Choice, bool]:
    """The backend, None for the reference; why; and whether that is because no kernel can run the call."""
    forced = os.environ.get("DMDR_FAST_BACKEND", "auto")
    if forced not in _NAMES:
        raise ValueError(f"DMDR_FAST_BACKEND: expected one of {', '.join(_NAMES)}, got {forced!r}")
    if any(arg is torch.float64 or (isinstance(arg, Tensor) and arg.dtype is torch.float64) for arg in args):
        return None, Choice(name, "reference", "float64 is computed by the reference"), False
    device, refused = first_tensor(args).device.type, list[tuple[str, str]]()
    reason = f"auto on {device} tensors" if forced == "auto" else f"DMDR_FAST_BACKEND={forced}"
    for candidate in _candidates(forced, device, name):
        backend = load(candidate)
        why = backend if isinstance(backend, str) else _misplaced(candidate, device) or backend.refusal(name, args)
        if not isinstance(backend, str) and why is None:
            return backend, Choice(name, candidate, reason, tuple(refused)), False
        refused.append((candidate, str(why)))
    fallen = forced != "reference"
    reason = f"fallback on {device} tensors" if fallen else reason
    return None, Choice(name, "reference", reason, tuple(refused)), fallen


def _candidates(forced: str, device: str, name: str) -> tuple[str, ...]:
    """The kernel backends to ask, in order; the reference comes after them."""
    if forced != "auto":
        return () if forced == "reference" else (forced,)
    on_cuda = ("cuda", "triton") if name in CUDA_FIRST else ("triton", "cuda")
    return {"cpu": ("cpu",), "cuda": on_cuda}.get(device, ())


def _misplaced(backend: str, device: str) -> str | None:
    """Why the backend does not run on tensors of this device, None where it does."""
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    if backend in ("cpu", "cuda") and device != backend:
        return f"it runs on {backend} tensors, these are on {device}"
    return None


def _fall_back(name: str, refused: tuple[tuple[str, str], ...], device: str) -> None:
    reasons = "; ".join(f"{backend}: {why}" for backend, why in refused) or f"no backend for {device} tensors"
    if os.environ.get("DMDR_FAST_STRICT") == "1":
        raise FallbackError(
            f"{name} would run in the plain PyTorch reference and DMDR_FAST_STRICT=1 forbids it. {reasons}. "
            "Change the call, build or install the backend, or unset DMDR_FAST_STRICT."
        )
    # A backend that is missing altogether is one line, not one per op.
    missing = all(isinstance(load(backend), str) for backend, _ in refused)
    key = ("*" if missing else name, reasons)
    if key not in _logged:
        _logged.add(key)
        what = "ops run" if missing else f"{name} runs"
        _LOG.warning("dmdr_fast: %s in the plain PyTorch reference. %s.", what, reasons)

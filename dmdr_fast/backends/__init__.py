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

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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

# What os.environ decodes at every look, which takes four times as long.
_ENVIRONMENT = vars(os.environ)["_data"]
_BACKEND = os.environ.encodekey("DMDR_FAST_BACKEND")

_loaded: dict[str, Backend | str] = {}
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


class _Implementation(NamedTuple):
    function: Callable[[Recorder, Any, Any], None]
    refuses: Callable[[Any], str | None] | None


def at_most(most: float, unit: str, what: str, size: Callable[[Any], int]) -> Callable[[Any], str | None]:
    """Why a raw function does not take ``what`` (plural) of more ``unit`` than ``most``, of its arguments."""

    def refusal(a: Any) -> str | None:
        return None if size(a) <= most else f"it takes {what} of at most {most} {unit}, these have {size(a)}"

    return refusal


class Backend:
    """The raw functions that one kind of kernel has.

    Args:
        recorder: makes the recorder that its functions take, from the call's arguments.
        refuses: why it can run nothing on this device, or None.
        takes_empty: its functions take tensors without elements; else the reference answers for them.
    """

    def __init__(
        self,
        recorder: Callable[[tuple], Recorder],
        refuses: Callable[[torch.device], str | None],
        *,
        takes_empty: bool = False,
    ) -> None:
        self.functions: dict[str, _Implementation] = {}
        self._recorder, self._refuses, self._takes_empty = recorder, refuses, takes_empty

    def implements(self, name: str, *, refuses: Callable[[Any], str | None] | None = None) -> Callable:
        """Register the decorated ``function(run, args, out)`` as this backend's ``name``.

        Args:
            refuses: of the arguments: why the function cannot run them, or None.
        """

        def register(function: Callable) -> Callable:
            self.functions[name] = _Implementation(function, refuses)
            return function

        return register

    def refusal(self, name: str, args: tuple) -> str | None:
        """Why it cannot run ``name(*args)``; None where it can."""
        if name not in self.functions:
            return f"it has no {name}"
        why = self._refuses(first_tensor(args).device)
        refuses = self.functions[name].refuses
        return refuses(args) if why is None and refuses is not None else why

    def run(self, name: str, args: tuple) -> tuple[Outputs, Plan | None]:
        """The results, and how to run such a call again; None where every call has to go this way."""
        if not self._takes_empty and any(isinstance(arg, Tensor) and arg.numel() == 0 for arg in args):
            return reference.run(name, args), None
        return on_device(first_tensor(args).device, self._run, name, args)

    def _run(self, name: str, args: tuple) -> tuple[Outputs, Plan | None]:
        run, results = self._recorder(args), RESULTS[name](args)
        made = tuple(run.result(result) for result in results)
        written = [not (result.shape is None or result.zero) for result in results]
        out = results._make(tensor if wanted else None for tensor, wanted in zip(made, written, strict=True))
        self.functions[name].function(run, args, out)
        outputs = made if len(made) > 1 else made[0]
        return outputs, run.plan(outputs)


def wanted() -> bytes | None:
    """DMDR_FAST_BACKEND as it stands, read at every call: a test or a user may change it between two."""
    return _ENVIRONMENT.get(_BACKEND)


def forced() -> str:
    """The backend that DMDR_FAST_BACKEND names."""
    value = os.environ.get("DMDR_FAST_BACKEND", "auto")
    if value not in _NAMES:
        raise ValueError(f"DMDR_FAST_BACKEND: expected one of {', '.join(_NAMES)}, got {value!r}")
    return value


def run(name: str, args: tuple) -> tuple[Outputs, Plan | None]:
    """Run the raw function ``name`` on the backend that fits its arguments: (results, plan for such calls)."""
    backend, refused, device = _select(name, args)
    if backend is not None:
        loaded = _loaded[backend]
        assert isinstance(loaded, Backend)
        return loaded.run(name, args)
    if device is not None and forced() != "reference":
        _fall_back(name, device, refused)
    return reference.run(name, args), None


def explain(name: str, args: tuple) -> Choice:
    """The choice that ``run(name, args)`` makes, with its reasons; runs nothing."""
    backend, refused, device = _select(name, args)
    wanted = forced()
    if device is None:
        reason = "float64 is computed by the reference"
    elif wanted != "auto" and wanted == (backend or "reference"):
        reason = f"DMDR_FAST_BACKEND={wanted}"
    else:
        reason = f"{'auto' if backend else 'fallback'} on {device} tensors"
    return Choice(name, backend or "reference", reason, tuple(refused))


def load(backend: str) -> Backend | str:
    """The backend, or why it cannot be loaded. Tried once per process."""
    loaded = _loaded.get(backend)
    if loaded is None:
        try:
            loaded = importlib.import_module(f"dmdr_fast.backends.{backend}").BACKEND
        except (ImportError, OSError) as error:
            loaded = f"it cannot be loaded ({error})"
        _loaded[backend] = loaded
    return loaded


def _select(name: str, args: tuple) -> tuple[str | None, list[tuple[str, str]], str | None]:
    """(backend or None for the reference, who refused and why, ``_kernel_device``)."""
    device, refused = _kernel_device(args), list[tuple[str, str]]()
    for backend in _candidates(forced(), device, name):
        why = _refusal(backend, device, name, args)
        if why is None:
            return backend, refused, device
        refused.append((backend, why))
    return None, refused, device


def _kernel_device(args: tuple) -> str | None:
    """Device type of the tensors, None where float64 asks for the reference."""
    wide = any(arg is torch.float64 or (isinstance(arg, Tensor) and arg.dtype is torch.float64) for arg in args)
    return None if wide else first_tensor(args).device.type


def _candidates(wanted: str, device: str | None, name: str) -> tuple[str, ...]:
    """The kernel backends to ask, in order; the reference comes after them."""
    if device is None or wanted == "reference":
        return ()
    if wanted != "auto":
        return (wanted,)
    if device == "cuda":
        return ("cuda", "triton") if name in CUDA_FIRST else ("triton", "cuda")
    return ("cpu",) if device == "cpu" else ()


def _refusal(name: str, device: str | None, function: str, args: tuple) -> str | None:
    backend = load(name)
    if isinstance(backend, str):
        return backend
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    if name in ("cpu", "cuda") and device != name:
        return f"it runs on {name} tensors, these are on {device}"
    return backend.refusal(function, args)


def _fall_back(name: str, device: str, refused: list[tuple[str, str]]) -> None:
    reasons = "; ".join(f"{backend}: {why}" for backend, why in refused) or f"no backend for {device} tensors"
    if os.environ.get("DMDR_FAST_STRICT") == "1":
        raise FallbackError(
            f"{name} would run in the plain PyTorch reference and DMDR_FAST_STRICT=1 forbids it. {reasons}. "
            "Change the call, build or install the backend, or unset DMDR_FAST_STRICT."
        )
    # A backend that is missing altogether is one line, not one per op.
    missing = all(isinstance(_loaded.get(backend), str) for backend, _ in refused)
    key = ("*" if missing else name, reasons)
    if key not in _logged:
        _logged.add(key)
        what = "ops run" if missing else f"{name} runs"
        _LOG.warning("dmdr_fast: %s in the plain PyTorch reference. %s.", what, reasons)

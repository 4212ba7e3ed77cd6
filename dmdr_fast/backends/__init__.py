"""Which kernel runs: triton, cuda, cpu or reference, and why.

Every public op lowers to raw functions ``<op>_fwd`` / ``<op>_bwd`` on checked tensors. ``reference`` has all
of them in plain PyTorch. A backend module (``cpu``, ``triton`` or ``cuda`` in this package) offers functions
of the same names and signatures for the ones it has, and

    supports(name, *args) -> str | None      None: it can run this call; a string: why it cannot

It is imported when an op first wants it; a module that cannot load raises ImportError with the reason.

``DMDR_FAST_BACKEND=auto|triton|cuda|cpu|reference`` picks one (default auto); ``DMDR_FAST_STRICT=1`` turns a
fallback to the reference into an error. Without it each reason for a fallback is logged once.
float64 always runs in the reference: the kernels compute in float32. That is not a fallback.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from dmdr_fast import reference

_LOG = logging.getLogger("dmdr_fast")
_NAMES = ("auto", "triton", "cuda", "cpu", "reference")

# Raw functions for which a committed result in benchmarks/results shows the CUDA kernel right and faster than
# Triton's on the same machine; on all others Triton comes first.
CUDA_FIRST: frozenset[str] = frozenset()

_modules: dict[str, ModuleType | str] = {}
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


def run(name: str, args: tuple):
    """Run the raw function ``name`` on the backend that fits its arguments."""
    backend, refused, forced, device = _select(name, args)
    if backend is not None:
        return getattr(_modules[backend], name)(*args)
    if device is not None and forced != "reference":
        _fall_back(name, device, refused)
    return getattr(reference, name)(*args)


def explain(name: str, args: tuple) -> Choice:
    """The choice that ``run(name, args)`` makes, with its reasons; runs nothing."""
    backend, refused, forced, device = _select(name, args)
    if device is None:
        reason = "float64 is computed by the reference"
    elif forced != "auto" and forced == (backend or "reference"):
        reason = f"DMDR_FAST_BACKEND={forced}"
    else:
        reason = f"{'auto' if backend else 'fallback'} on {device} tensors"
    return Choice(name, backend or "reference", reason, tuple(refused))


def _select(name: str, args: tuple) -> tuple[str | None, list[tuple[str, str]], str, str | None]:
    """(backend or None for the reference, who refused and why, DMDR_FAST_BACKEND, ``_kernel_device``)."""
    forced, device, refused = _forced(), _kernel_device(args), []
    for backend in _candidates(forced, device, name):
        why = _refusal(backend, _load(backend), device, name, args)
        if why is None:
            return backend, refused, forced, device
        refused.append((backend, why))
    return None, refused, forced, device


def _forced() -> str:
    """DMDR_FAST_BACKEND, read at every call: a test or a user may change it between two."""
    value = os.environ.get("DMDR_FAST_BACKEND", "auto")
    if value not in _NAMES:
        raise ValueError(f"DMDR_FAST_BACKEND: expected one of {', '.join(_NAMES)}, got {value!r}")
    return value


def _kernel_device(args: tuple) -> str | None:
    """Device type of the tensors, None where float64 asks for the reference."""
    device = None
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.dtype is torch.float64:
                return None
            device = device or arg.device.type
        elif arg is torch.float64:
            return None
    return device


def _candidates(forced: str, device: str | None, name: str) -> tuple[str, ...]:
    """The kernel backends to ask, in order; the reference comes after them."""
    if device is None or forced == "reference":
        return ()
    if forced != "auto":
        return (forced,)
    if device == "cuda":
        return ("cuda", "triton") if name in CUDA_FIRST else ("triton", "cuda")
    return ("cpu",) if device == "cpu" else ()


def _load(backend: str) -> ModuleType | str:
    """The backend's module, or why it cannot be loaded. Tried once per process."""
    module = _modules.get(backend)
    if module is None:
        try:
            module = importlib.import_module(f"dmdr_fast.backends.{backend}")
        except (ImportError, OSError) as error:
            module = f"it cannot be loaded ({error})"
        _modules[backend] = module
    return module


def _refusal(backend: str, module: ModuleType | str, device: str | None, name: str, args: tuple) -> str | None:
    if isinstance(module, str):
        return module
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    if backend in ("cpu", "cuda") and device != backend:
        return f"it runs on {backend} tensors, these are on {device}"
    if not hasattr(module, name):
        return f"it has no {name}"
    return module.supports(name, *args)


def _fall_back(name: str, device: str, refused: list[tuple[str, str]]) -> None:
    reasons = "; ".join(f"{backend}: {why}" for backend, why in refused) or f"no backend for {device} tensors"
    if os.environ.get("DMDR_FAST_STRICT") == "1":
        raise FallbackError(
            f"{name} would run in the plain PyTorch reference and DMDR_FAST_STRICT=1 forbids it. {reasons}. "
            "Change the call, build or install the backend, or unset DMDR_FAST_STRICT."
        )
    # A backend that is missing altogether is one line, not one per op.
    missing = all(isinstance(_modules.get(backend), str) for backend, _ in refused)
    key = ("*" if missing else name, reasons)
    if key not in _logged:
        _logged.add(key)
        what = "ops run" if missing else f"{name} runs"
        _LOG.warning("dmdr_fast: %s in the plain PyTorch reference. %s.", what, reasons)

"""The correctness gate: nothing is timed before it agrees with float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import Case, upstream

# Relative L2 error that no op may pass, whatever eager PyTorch does; a case has its own for float32.
CEILING = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class GateError:
    """Relative L2 errors of one output or gradient against float64; ``eager`` None: it has no counterpart."""

    fused: float
    eager: float | None
    bound: float


class GateFailure(AssertionError):
    """An op that is timed must be right first."""


def check(case: Case, device: torch.device) -> dict[str, GateError]:
    """Compare outputs and gradients of ``case`` with the float64 reference.

    The bound is the design's: at most twice eager's own error in the same dtype, and under :data:`CEILING`. Half a
    unit in the last place is always granted: eager may be exact by chance.

    Raises:
        GateFailure: an error is above its bound, or is not a number.
    """
    tensors = case.draw(device, seed=0)
    fused = evaluate(case.fused, tensors, case)
    eager = {} if case.own_noise else evaluate(case.plain, tensors, case)
    truth = evaluate(case.fused, _in_float64(tensors), case)
    errors = {}
    for name, exact in truth.items():
        own = relative_error(fused[name], exact)
        plain = relative_error(eager[name], exact) if name in eager else None
        errors[name] = GateError(own, plain, bound(fused[name].dtype, plain, case.ceiling))
    wrong = [f"{name}: {e.fused:.2e}, allowed {e.bound:.2e}" for name, e in errors.items() if not e.fused <= e.bound]
    if wrong:
        raise GateFailure(
            f"{case.name} {list(case.shape)} {case.dtype}: relative L2 error against float64 too large, "
            f"nothing is timed. {'; '.join(wrong)}"
        )
    return errors


def bound(dtype: torch.dtype, eager_error: float | None, fp32_ceiling: float = 1e-5) -> float:
    """The largest error allowed for a result of ``dtype``."""
    ceiling = CEILING.get(dtype, fp32_ceiling)
    if eager_error is None:
        return ceiling
    return min(ceiling, max(2 * eager_error, torch.finfo(dtype).eps / 2))


def evaluate(function: Callable, tensors: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Outputs and gradients by name, for incoming gradients that depend on nothing but the outputs' shapes."""
    outputs = function(**tensors)
    results = {name: out.detach() for name, out in zip(case.outputs, outputs, strict=True)}
    if case.wrt:
        incoming = upstream(tuple(out.detach() for out in outputs), case.dtype, seed=1)
        grads = torch.autograd.grad(outputs, [tensors[name] for name in case.wrt], incoming)
        results |= {f"grad of {name}": grad for name, grad in zip(case.wrt, grads, strict=True)}
    return results


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in L2, in float64."""
    return (torch.linalg.vector_norm(value.double() - truth) / torch.linalg.vector_norm(truth)).item()


def _in_float64(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wide = {}
    for name, tensor in tensors.items():
        wide[name] = tensor.detach().double() if tensor.is_floating_point() else tensor
        wide[name].requires_grad_(tensor.requires_grad)
    return wide

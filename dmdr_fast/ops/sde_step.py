"""A stochastic sampling step and its log-probability."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dmdr_fast.backends.plans import Live
from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, written
from dmdr_fast.ops._noise import seeded_normals
from dmdr_fast.reference import Result, compute_dtype, like, per_sample

SDEKind = Literal["flow_grpo", "dance", "cps"]


class SDEStep(NamedTuple):
    """What ``sde_step_logprob`` returns.

    Attributes:
        next_sample: x's shape: the given one itself, or the drawn one in x's dtype.
        logprob: [B] float32.
        mean: x's shape, float32.
        std: [B] float32: s of x' = mean + s n.
    """

    next_sample: Tensor
    logprob: Tensor
    mean: Tensor
    std: Tensor


def sde_step_logprob(
    x: Tensor,
    v: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    kind: SDEKind,
    eta: float,
    next_sample: Tensor | None = None,
    seed: Tensor | None = None,
    offset: int = 0,
) -> SDEStep:
    r"""One stochastic sampling step x' = a x + b v + s n of a flow-matching model and the log-prob of x'.

    With t = sigma, t' = sigma_next, dt = t' - t < 0, n normal:

        a = 1 + gam^2 dt / (2 t),  b = dt (1 + gam^2 (1 - t) / (2 t)),  s = gam sqrt(-dt)
            flow_grpo: gam = eta sqrt(t / (1 - t)); for t = 1 the denominator takes t'
            dance:     gam = eta
        a = 1 - t' + t' cos th,  b = -t (1 - t') + t' (1 - t) cos th,  s = t' sin th
            cps:       th = eta pi / 2

        logprob = mean over a sample of -(x' - mean)^2 / (2 s^2) - log s - log sqrt(2 pi)
            cps:       of -(x' - mean)^2

    A drawn x' is rounded to x's dtype before its log-prob is taken: replaying the step with ``next_sample``
    gives the same bits, so the first ratio is exactly 1.

    Args:
        x: [B, ...] the sample at sigma, at least 2-D, any float dtype.
        v: x's shape, the velocity there.
        sigma: [B] or one number, in (0, 1]; a constant.
        sigma_next: [B] or one number, 0 <= sigma_next < sigma; a constant. flow_grpo needs sigma_next < 1.
        kind: "flow_grpo", "dance" or "cps".
        eta: strength of the noise, > 0 (cps: also 0). Usual: 0.7 flow_grpo, 0.3 dance.
        next_sample: x's shape; the step whose log-prob is asked for, a constant. Exactly one of it and
            ``seed`` is given.
        seed: int64 [2]; n = normal_noise(x, seed, offset=offset) in float32.
        offset: index of x's first element in the seeded stream.

    Returns:
        ``SDEStep`` (next_sample, logprob, mean, std). flow_grpo's own ``std_dev_t`` is
        std / sqrt(sigma - sigma_next).

    Differentiable in v and x through logprob, mean and a drawn next_sample. The log-prob treats x' as fixed,
    as all policy gradients do.

    Raises:
        TypeError, ValueError: an argument is not as described; values of sigma and sigma_next are read only
            on the CPU.

    Source: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), coefficients-preserving sampling
    (arXiv 2509.05952).
    """
    op = "sde_step_logprob"
    check.floating(op, "x", x, min_dim=2)
    check.offset(op, offset)
    dtype = compute_dtype(x, v, next_sample)
    sigma = check.scalar(op, "sigma", sigma, x, dtype, above=0, maximum=1)
    sigma_next = check.scalar(op, "sigma_next", sigma_next, x, dtype, minimum=0, maximum=1)
    drawn, logprob, mean, std = _fwd.checked(op, x, v, sigma, sigma_next, next_sample, seed, offset, kind, eta)
    return SDEStep(drawn if next_sample is None else next_sample, logprob, mean, std)


def _check(op: str, a) -> None:
    check.like(op, "v", a.v, a.x, "x")
    check.number(op, "eta", a.eta, **({"minimum": 0} if a.kind == "cps" else {"above": 0}))
    check.given_or_drawn(op, "next_sample", a.next_sample, a.seed, a.x, "x")
    for name in ("sigma", "sigma_next"):
        check.per_sample(op, name, getattr(a, name), a.x, "x")
    for name in ("next_sample", "sigma", "sigma_next"):
        check.constant(op, name, getattr(a, name))


def _check_values(op: str, a) -> None:
    check.values(op, "sigma", a.sigma, above=0, maximum=1)
    check.values(op, "sigma_next", a.sigma_next, minimum=0, maximum=1)
    check.below(op, "sigma_next", a.sigma_next, a.sigma, "sigma")


def _save(ctx, a, results) -> None:
    next_sample = results[0] if a.next_sample is None else a.next_sample
    ctx.save_for_backward(a.x, a.v, a.sigma, a.sigma_next, next_sample)
    ctx.options = a.kind, a.eta


def _backward(ctx, needed, grad_next, grad_logprob, grad_mean, _) -> dict:
    needs = needed.x, needed.v
    grad_x, grad_v = _bwd(grad_next, grad_logprob, grad_mean, *ctx.saved_tensors, *ctx.options, *needs)
    return {"x": grad_x if needed.x else None, "v": grad_v if needed.v else None}


def _results(a):
    compute = compute_dtype(a.x, a.v, a.next_sample)
    per_sample = Result(a.x.shape[:1], compute)
    return like(a.x, needed=a.next_sample is None), per_sample, like(a.x, compute), per_sample


def _formula(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, next_sample: Tensor | None, seed: Tensor | None,
    offset: Live, kind: SDEKind, eta: float,
):  # fmt: skip
    """A drawn sample is rounded first and the log-prob is the rounded one's, so a replay gives the same bits.
    The log-prob takes the next sample as a constant.
    """
    compute, drawn = compute_dtype(x, v, next_sample), None
    keep, move, std = _coefficients(sigma, sigma_next, kind, eta)
    mean = (per_sample(keep, x) * x.to(compute) + per_sample(move, x) * v.to(compute)).contiguous()
    if next_sample is None:
        assert seed is not None  # the check has seen to it
        noise = seeded_normals(list(x.shape), seed, offset, compute)
        drawn = next_sample = (mean + per_sample(std, x) * noise).to(x.dtype)
    square = (next_sample.detach().to(compute) - mean).square().flatten(1).mean(1)
    if kind == "cps":
        return drawn, -square, mean, std
    return drawn, -square / (2 * std * std) - torch.log(std) - 0.5 * math.log(2 * math.pi), mean, std


def _formula_bwd(
    grad_next: Tensor | None, grad_logprob: Tensor | None, grad_mean: Tensor | None, x: Tensor, v: Tensor,
    sigma: Tensor, sigma_next: Tensor, next_sample: Tensor | None, kind: SDEKind, eta: float,
    need_x: bool, need_v: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The log-prob is that of a fixed next_sample; a drawn one (``grad_next``) depends on the mean with slope 1."""
    compute = compute_dtype(x, v, next_sample)
    keep, move, std = _coefficients(sigma, sigma_next, kind, eta)
    grad = torch.zeros_like(x, dtype=compute)
    for part in (grad_next, grad_mean):
        if part is not None:
            grad = grad + part.to(compute)
    if grad_logprob is not None:
        assert next_sample is not None  # the forward keeps the one that it drew
        mean = per_sample(keep, x) * x.to(compute) + per_sample(move, x) * v.to(compute)
        slope = torch.full_like(std, 2.0) if kind == "cps" else 1 / (std * std)
        slope = grad_logprob.to(compute) * slope / max(x[:1].numel(), 1)
        grad = grad + per_sample(slope, x) * (next_sample.detach().to(compute) - mean)
    return per_sample(keep, x) * grad, per_sample(move, x) * grad


def _coefficients(sigma: Tensor, sigma_next: Tensor, kind: str, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, s) [B] of x' = a x + b v + s n."""
    if kind == "cps":
        angle = eta * math.pi / 2
        keep = sigma_next * math.cos(angle)
        a = (1 - sigma_next) + keep
        b = -sigma * (1 - sigma_next) + (1 - sigma) * keep
        return a, b, sigma_next * math.sin(angle)
    dt = sigma_next - sigma
    if kind == "dance":
        gamma = torch.full_like(sigma, eta)
    else:
        gamma = eta * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma)))
    drift = gamma * gamma / (2 * sigma)
    return 1 + drift * dt, dt * (1 + drift * (1 - sigma)), gamma * torch.sqrt(-dt)


_bwd = Raw(
    "sde_step_bwd", "grad_x grad_v", lambda a: (like(a.x, needed=a.need_x), like(a.v, needed=a.need_v)), _formula_bwd
)
_fwd = Raw(
    "sde_step_fwd", "drawn logprob mean std", _results, _formula,
    check=_check, check_values=_check_values, backward=written(_save, _backward), constants=(3,),
)  # fmt: skip

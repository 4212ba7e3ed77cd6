"""A stochastic sampling step and its log-probability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define


class SDEStep(NamedTuple):
    """What :func:`sde_step_logprob` returns.

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
    kind: str,
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
        :class:`SDEStep` (next_sample, logprob, mean, std). flow_grpo's own ``std_dev_t`` is
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
    check.like(op, "v", v, x, "x")
    check.choice(op, "kind", kind, ("flow_grpo", "dance", "cps"))
    if kind == "cps":
        check.number(op, "eta", eta, minimum=0)
    else:
        check.number(op, "eta", eta, above=0)
    if (next_sample is None) == (seed is None):
        got = "none" if seed is None else "both"
        raise ValueError(f"{op}: next_sample, seed: expected exactly one of them, got {got}")
    if next_sample is not None:
        check.like(op, "next_sample", next_sample, x, "x")
        check.constant(op, "next_sample", next_sample)
    else:
        check.seed(op, seed, x, "x")
    check.offset(op, offset)
    check.constant(op, "sigma", sigma)
    check.constant(op, "sigma_next", sigma_next)
    dtype = check.compute_dtype(x, v, next_sample)
    sigma = check.per_sample(op, "sigma", sigma, x, "x", dtype, above=0, maximum=1)
    sigma_next = check.per_sample(op, "sigma_next", sigma_next, x, "x", dtype, minimum=0, maximum=1)
    check.below(op, "sigma_next", sigma_next, sigma, "sigma")
    drawn, logprob, mean, std = _sde_step_fwd(x, v, sigma, sigma_next, next_sample, seed, offset, kind, float(eta))
    return SDEStep(drawn if next_sample is None else next_sample, logprob, mean, std)


def _save(ctx, inputs, output):
    x, v, sigma, sigma_next, next_sample, _, _, kind, eta = inputs
    drawn, _, _, std = output
    if next_sample is None:
        ctx.mark_non_differentiable(std)
        next_sample = drawn
    else:
        ctx.mark_non_differentiable(drawn, std)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, v, sigma, sigma_next, next_sample)
    ctx.options = kind, eta


def _backward(ctx, grad_next, grad_logprob, grad_mean, grad_of_std):
    if grad_next is None and grad_logprob is None and grad_mean is None:
        return (None,) * 9
    need_x, need_v, *_ = ctx.needs_input_grad
    grad_x, grad_v = _sde_step_bwd(grad_next, grad_logprob, grad_mean, *ctx.saved_tensors, *ctx.options, need_x, need_v)
    return grad_x if need_x else None, grad_v if need_v else None, *[None] * 7


def _fake_fwd(x, v, sigma, sigma_next, next_sample, seed, offset, kind, eta):
    compute = check.compute_dtype(x, v, next_sample)
    per_sample = x.new_empty(x.shape[:1], dtype=compute)
    drawn = x.new_empty(x.shape if next_sample is None else (0,))
    return drawn, per_sample, x.new_empty(x.shape, dtype=compute), torch.empty_like(per_sample)


def _fake_bwd(grad_next, grad_logprob, grad_mean, x, v, sigma, sigma_next, next_sample, kind, eta, need_x, need_v):
    return x.new_empty(x.shape if need_x else (0,)), v.new_empty(v.shape if need_v else (0,))


_sde_step_bwd = define(
    "sde_step_bwd(Tensor? grad_next, Tensor? grad_logprob, Tensor? grad_mean, Tensor x, Tensor v, "
    "Tensor sigma, Tensor sigma_next, Tensor next_sample, str kind, float eta, bool need_x, bool need_v) "
    "-> (Tensor grad_x, Tensor grad_v)",
    _fake_bwd,
)
_sde_step_fwd = define(
    "sde_step_fwd(Tensor x, Tensor v, Tensor sigma, Tensor sigma_next, Tensor? next_sample, Tensor? seed, "
    "SymInt offset, str kind, float eta) "
    "-> (Tensor next_sample_drawn, Tensor logprob, Tensor mean, Tensor std)",
    _fake_fwd,
    setup_context=_save,
    backward=_backward,
)

"""SDE steps with their log-probabilities in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.reference.noise import seeded_normals
from dmdr_fast.reference.precision import compute_dtype, per_sample
from dmdr_fast.reference.registry import implements


@implements("sde_step_fwd")
def sde_step_fwd(a) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(next sample in x's dtype, log-prob [B], mean in the compute dtype, std [B]).

    A drawn sample is rounded first and the log-prob is the rounded one's, so a replay gives the same bits.
    The log-prob takes the next sample as a constant.
    """
    compute = compute_dtype(a.x, a.v, a.next_sample)
    keep, move, std = sde_coefficients(a.sigma, a.sigma_next, a.kind, a.eta)
    mean = (per_sample(keep, a.x) * a.x.to(compute) + per_sample(move, a.x) * a.v.to(compute)).contiguous()
    drawn, next_sample = None, a.next_sample
    if next_sample is None:
        noise = seeded_normals(a.x.shape, a.seed, a.offset, compute)
        drawn = next_sample = (mean + per_sample(std, a.x) * noise).to(a.x.dtype)
    square = (next_sample.detach().to(compute) - mean).square().flatten(1).mean(1)
    if a.kind == "cps":
        return drawn, -square, mean, std
    return drawn, -square / (2 * std * std) - torch.log(std) - 0.5 * math.log(2 * math.pi), mean, std


@implements("sde_step_bwd")
def sde_step_bwd(a) -> tuple[Tensor, Tensor]:
    """Gradients of x and v.

    The log-prob is that of a fixed next_sample; a drawn one (``grad_next``) depends on the mean with slope 1.
    """
    compute = compute_dtype(a.x, a.v, a.next_sample)
    keep, move, std = sde_coefficients(a.sigma, a.sigma_next, a.kind, a.eta)
    grad = torch.zeros_like(a.x, dtype=compute)
    for part in (a.grad_next, a.grad_mean):
        if part is not None:
            grad = grad + part.to(compute)
    if a.grad_logprob is not None:
        mean = per_sample(keep, a.x) * a.x.to(compute) + per_sample(move, a.x) * a.v.to(compute)
        slope = torch.full_like(std, 2.0) if a.kind == "cps" else 1 / (std * std)
        slope = a.grad_logprob.to(compute) * slope / max(a.x[:1].numel(), 1)
        grad = grad + per_sample(slope, a.x) * (a.next_sample.detach().to(compute) - mean)
    return per_sample(keep, a.x) * grad, per_sample(move, a.x) * grad


def sde_coefficients(sigma: Tensor, sigma_next: Tensor, kind: str, eta: float) -> tuple[Tensor, Tensor, Tensor]:
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

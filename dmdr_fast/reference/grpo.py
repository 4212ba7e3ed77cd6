"""SDE steps with their log-probabilities, and the clipped policy loss, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.reference.noise import normal_noise_fwd
from dmdr_fast.reference.precision import compute_dtype, per_sample


def sde_step_fwd(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    next_sample: Tensor | None,
    seed: Tensor | None,
    offset: int,
    kind: str,
    eta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(next sample in x's dtype, log-prob [B], mean in the compute dtype, std [B]).

    A drawn sample is rounded first and the log-prob is the rounded one's, so a replay gives the same bits.
    With ``next_sample`` given the first result is an empty [0].
    """
    compute = compute_dtype(x, v, next_sample)
    a, b, std = sde_coefficients(sigma, sigma_next, kind, eta)
    mean = (per_sample(a, x) * x.to(compute) + per_sample(b, x) * v.to(compute)).contiguous()
    drawn = x.new_empty(0)
    if next_sample is None:
        noise = normal_noise_fwd(x.shape, seed, offset, compute)
        drawn = next_sample = (mean + per_sample(std, x) * noise).to(x.dtype)
    square = (next_sample.to(compute) - mean).square().flatten(1).mean(1)
    logprob = -square if kind == "cps" else -square / (2 * std * std) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return drawn, logprob, mean, std


def sde_step_bwd(
    grad_next: Tensor | None,
    grad_logprob: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    next_sample: Tensor,
    kind: str,
    eta: float,
    need_x: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and v; one that is not needed comes back as an empty [0].

    The log-prob is that of a fixed next_sample; a drawn one (``grad_next``) depends on the mean with slope 1.
    """
    compute = compute_dtype(x, v, next_sample)
    a, b, std = sde_coefficients(sigma, sigma_next, kind, eta)
    grad = torch.zeros_like(x, dtype=compute)
    for part in (grad_next, grad_mean):
        if part is not None:
            grad = grad + part.to(compute)
    if grad_logprob is not None:
        mean = per_sample(a, x) * x.to(compute) + per_sample(b, x) * v.to(compute)
        slope = torch.full_like(std, 2.0) if kind == "cps" else 1 / (std * std)
        slope = grad_logprob.to(compute) * slope / max(x[:1].numel(), 1)
        grad = grad + per_sample(slope, x) * (next_sample.to(compute) - mean)
    grad_x = (per_sample(a, x) * grad).to(x.dtype).contiguous() if need_x else x.new_empty(0)
    grad_v = (per_sample(b, x) * grad).to(v.dtype).contiguous() if need_v else v.new_empty(0)
    return grad_x, grad_v


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


def grpo_loss_fwd(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
) -> tuple[Tensor, Tensor]:
    """(loss 0-d, [mean ratio, max |ratio - 1|, clipped fraction, mean (logprob - old)^2 / 2])."""
    ratio, advantage = _ratio(logprob, old_logprob, advantage, adv_clip)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    count = max(ratio.numel(), 1)
    change = (logprob - old_logprob).to(ratio.dtype)
    stats = torch.stack(
        (
            ratio.sum() / count,
            (ratio - 1).abs().max() if ratio.numel() else ratio.new_zeros(()),
            ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).sum() / count,
            change.square().sum() / (2 * count),
        )
    )
    return torch.maximum(plain, clipped).sum() / count, stats.to(ratio.dtype)


def grpo_loss_bwd(
    grad_loss: Tensor,
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
) -> Tensor:
    """The gradient of logprob: -A ratio / count where the unclipped term is the larger one, else 0."""
    ratio, advantage = _ratio(logprob, old_logprob, advantage, adv_clip)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    grad = torch.where(plain >= clipped, plain, 0) * (grad_loss.to(ratio.dtype) / max(ratio.numel(), 1))
    return grad.to(logprob.dtype).contiguous()


def _ratio(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, adv_clip: float) -> tuple[Tensor, Tensor]:
    """(ratio, advantage clamped to [-adv_clip, adv_clip]) in the compute dtype."""
    compute = compute_dtype(logprob, old_logprob, advantage)
    ratio = torch.exp(logprob.to(compute) - old_logprob.to(compute))
    return ratio, advantage.to(compute).clamp(-adv_clip, adv_clip)

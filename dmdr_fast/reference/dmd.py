"""The DMD gradient in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.reference.precision import compute_dtype, per_sample
from dmdr_fast.reference.registry import implements


@implements("dmd_gradient_fwd")
def dmd_gradient_fwd(a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad, normaliser [B], loss 0-d, loss_scale 0-d); see :func:`dmdr_fast.ops.dmd_gradient`.

    ``alpha`` None means 1 - sigma, ``cfg_tensor`` [B] takes the place of ``cfg_scale``, ``mask`` is boolean
    with x0's number of dimensions. ``loss_scale`` is d loss / d x0 divided by grad: 2 factor / count, or 2
    factor; ``scaled`` multiplies grad by it and returns 1 in its place (a mean must then have no mask).
    """
    compute = compute_dtype(a.x0, a.x_t, a.pred_fake, a.pred_real, a.pred_real_uncond)
    x0, x_t, fake, real = (tensor.to(compute) for tensor in (a.x0, a.x_t, a.pred_fake, a.pred_real))
    if a.pred_real_uncond is not None:
        scale = a.cfg_scale if a.cfg_tensor is None else per_sample(a.cfg_tensor, x0)
        uncond = a.pred_real_uncond.to(compute)
        real = (uncond if a.cfg_mode == "standard" else real) + scale * (real - uncond)

    keep, gain = _denoiser(a.prediction, a.sigma, 1 - a.sigma if a.alpha is None else a.alpha)
    g = per_sample(gain, x0) * (fake - real)
    # x0 and x_t are close at small sigma: their difference first, it is exact there.
    distance = x0 if keep is None else x0 - per_sample(keep, x0) * x_t
    norm = _normalizer(distance - per_sample(gain, x0) * real, a.mask, a.normalizer, a.eps, a.eps_mode)
    g = g / per_sample(norm, x0)
    if a.weight is not None:
        g = per_sample(a.weight, x0) * g
    g = _without_nonfinite(_select(g, a.mask), a.nan_policy, a.out_dtype or a.x0.dtype)

    count = g.new_full((), g.numel()) if a.mask is None else a.mask.expand_as(g).sum().to(compute)
    loss_scale = 2 * a.factor / count.clamp(min=1) if a.reduction == "mean" else torch.full_like(count, 2 * a.factor)
    loss = g.square().sum() * (0.5 * loss_scale)
    if a.scaled:
        g, loss_scale = loss_scale * g, torch.ones_like(loss_scale)
    return g, norm, loss, loss_scale


@implements("dmd_loss_bwd")
def dmd_loss_bwd(a) -> Tensor:
    """grad_loss * loss_scale * g in ``dtype``."""
    compute = a.loss_scale.dtype
    return (a.grad_loss * a.loss_scale).to(compute) * a.g.to(compute)


def _denoiser(prediction: str, sigma: Tensor, alpha: Tensor) -> tuple[Tensor | None, Tensor]:
    """(keep, gain) of x0_hat = keep x_t + gain prediction; keep None is 0."""
    if prediction == "flow":
        return torch.ones_like(sigma), -sigma
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha, -sigma
    return None, torch.ones_like(sigma)


def _select(values: Tensor, mask: Tensor | None) -> Tensor:
    """0 where the mask is off, whatever stood there (a product would keep a NaN)."""
    return values if mask is None else torch.where(mask, values, 0)


def _normalizer(distance: Tensor, mask: Tensor | None, normalizer: str, eps: float, eps_mode: str) -> Tensor:
    """mean |x0 - x0_real| over what the mask selects, per sample or over all, with eps: [B]."""
    batch = distance.shape[0]
    if normalizer == "none":
        return distance.new_ones(batch)
    total = _select(distance.abs(), mask).flatten(1).sum(1)
    if mask is None:
        count = torch.full_like(total, distance[:1].numel())
    else:
        count = mask.expand_as(distance).flatten(1).sum(1).to(total.dtype)
    if normalizer == "global":
        total, count = total.sum().expand(batch), count.sum().expand(batch)
    mean = total / count.clamp(min=1)
    if eps_mode == "add":
        return mean + eps
    return mean.clamp(min=eps) if eps_mode == "clamp" else mean


def _without_nonfinite(g: Tensor, nan_policy: str, out_dtype: torch.dtype) -> Tensor:
    """Apply the policy where g is not finite once rounded to ``out_dtype``."""
    if nan_policy == "keep":
        return g
    finite = torch.isfinite(g.to(out_dtype))
    if nan_policy == "zero":
        return torch.where(finite, g, 0)
    if nan_policy == "zero_sample":
        return torch.where(per_sample(finite.flatten(1).all(1), g), g, 0)
    largest = torch.finfo(out_dtype).max
    return torch.where(finite, g, g.nan_to_num(nan=0.0).clamp(-largest, largest))

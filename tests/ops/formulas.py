"""Every op as its formula in plain PyTorch, written apart from ``dmdr_fast.reference``.

In float64 they are the truth; in the dtype of a call they are what eager PyTorch makes of it. Keywords are those of
``dmdr_fast.ops``; results come as a tuple. Where an op goes on with a result that it has rounded, ``kept`` is that
result: values start from it, gradients do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops


def normal_noise(shape_like: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return (_noise(shape_like, seed),)


def renoise(
    x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None = None, seed: Tensor | None = None
) -> tuple[Tensor, ...]:
    noise = _noise(x0, seed) if noise is None else noise
    return ((_of_sample(alpha, x0) * x0 + _of_sample(sigma, x0) * noise).to(x0.dtype),)


def dmd_gradient(x0: Tensor, *args: Tensor, **options) -> tuple[Tensor, ...]:
    grad, norm, counted = _dmd(x0, *args, **options)
    return grad, norm, 0.5 * _mean(grad.to(norm.dtype) ** 2, counted)


def dmd_loss(x0: Tensor, *args: Tensor, reduction: str = "mean", factor: float = 0.5, **options) -> tuple[Tensor, ...]:
    with torch.no_grad():
        grad, norm, counted = _dmd(x0, *args, **options)
    difference = x0.to(norm.dtype) - (x0 - grad).detach().to(norm.dtype)
    square = torch.where(counted, difference**2, 0.0)
    return (factor * (square.sum() if reduction == "sum" else _mean(square, counted)),)


def _dmd(
    x0, x_t, pred_fake, pred_real, pred_real_uncond=None, *, sigma, alpha=None, cfg_scale=None, cfg_mode="standard",
    prediction="flow", normalizer="per_sample", eps=1e-8, eps_mode="add", mask=None, weight=None,
):  # fmt: skip
    """g, the normaliser [B], and what the means count."""
    wide = torch.float64 if x0.dtype is torch.float64 else torch.float32
    if pred_real_uncond is not None:
        start = pred_real_uncond if cfg_mode == "standard" else pred_real
        scale = _of_sample(cfg_scale, x0) if isinstance(cfg_scale, Tensor) else cfg_scale
        pred_real = start + scale * (pred_real - pred_real_uncond)
    s, a = _of_sample(sigma, x0), _of_sample(1 - sigma if alpha is None else alpha, x0)
    denoise: Callable[[Tensor], Tensor] = {
        "flow": lambda p: x_t - s * p,
        "eps": lambda p: (x_t - s * p) / a,
        "v": lambda p: a * x_t - s * p,
        "x0": lambda p: p,
    }[prediction]
    fake, real = denoise(pred_fake), denoise(pred_real)
    counted = torch.ones_like(x0, dtype=torch.bool) if mask is None else mask.expand(x0.shape)
    distance = torch.where(counted, (x0 - real).abs().to(wide), 0.0)
    if normalizer == "per_sample":
        norm = distance.flatten(1).sum(1) / counted.flatten(1).sum(1)
    elif normalizer == "global":
        norm = (distance.sum() / counted.sum()).expand(x0.shape[0])
    else:
        norm = torch.ones(x0.shape[0], dtype=wide)
    if normalizer != "none":
        norm = {"add": norm + eps, "clamp": norm.clamp(min=eps), "none": norm}[eps_mode]
    grad = (fake - real) / _of_sample(norm, x0)
    if weight is not None:
        grad = _of_sample(weight, x0) * grad
    return torch.where(counted, grad, 0.0).to(x0.dtype), norm, counted


def preprocess_reward(
    image: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], antialias: bool
) -> tuple[Tensor, ...]:
    wide = image.double() if image.dtype is torch.float64 else image.float()
    unit = (wide.clamp(-1, 1) + 1) / 2
    resized = F.interpolate(unit, size=size, mode="bicubic", antialias=antialias, align_corners=False)
    mean, std = (torch.tensor(values, dtype=wide.dtype).view(-1, 1, 1) for values in (mean, std))
    return (((resized - mean) / std).to(image.dtype),)


def sde_step_logprob(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, *, kind: str, eta: float,
    next_sample: Tensor | None = None, seed: Tensor | None = None, kept: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    dtype, x, v = x.dtype, x.to(wide), v.to(wide)
    t, after = _of_sample(sigma, x), _of_sample(sigma_next, x)
    dt = after - t
    if kind == "cps":
        angle = eta * math.pi / 2
        predicted, noise = x - t * v, x + (1 - t) * v
        mean, std = (1 - after) * predicted + after * math.cos(angle) * noise, after * math.sin(angle)
    else:
        gam = eta * torch.sqrt(t / (1 - torch.where(t == 1, after, t))) if kind == "flow_grpo" else eta + 0 * t
        mean = x * (1 + gam**2 / (2 * t) * dt) + v * (1 + gam**2 * (1 - t) / (2 * t)) * dt
        std = gam * torch.sqrt(-dt)
    drawn = next_sample
    if drawn is None:
        drawn = (mean + std * _noise(x, seed)).to(dtype)
    error = (drawn.detach().to(wide) if kept is None else kept) - mean
    if kind == "cps":
        logprob = -(error**2)
    else:
        logprob = -(error**2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return drawn, logprob.flatten(1).mean(1), mean, std.flatten()


def grpo_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, ...]:
    advantage = advantage.clamp(-5, 5)
    ratio = torch.exp(logprob - old_logprob)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)).mean()
    ratio = ratio.detach()
    outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    kl = 0.5 * (logprob.detach() - old_logprob).square().mean()
    return loss, ratio.mean(), (ratio - 1).abs().max(), outside.to(ratio.dtype).mean(), kl


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return ((normal * (1 + _of_token(scale, x)) + _of_token(shift, x)).to(x.dtype),)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return ((x + _of_token(gate, x) * h).to(x.dtype),)


def gated_residual_layer_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, ...]:
    (residual,) = gated_residual(x, h, gate)
    rounded = residual if kept is None else kept + (residual - residual.detach())
    return residual, *layer_norm_modulate(rounded, shift, scale)


def rms_norm_scale(x: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, ...]:
    return ((F.rms_norm(x, x.shape[-1:], weight, eps=1e-6) * _of_token(scale, x)).to(x.dtype),)


def gated_residual_rms_norm(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    return ((x + _of_token(gate, x) * F.rms_norm(h, h.shape[-1:], weight, eps=1e-6)).to(x.dtype),)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, interleaved: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        y = y if weight is None else y * weight
        if cos is None:
            return y.to(x.dtype)
        pairs = y.unflatten(-1, (-1, 2)) if interleaved else y.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1)
        turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
        return (y * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)

    return rotated(q, q_weight), rotated(k, k_weight)


def gelu_mul(packed: Tensor) -> tuple[Tensor, ...]:
    value, gate = packed.chunk(2, -1)
    return (value * F.gelu(gate),)


def silu_mul(packed: Tensor) -> tuple[Tensor, ...]:
    value, gate = packed.chunk(2, -1)
    return (value * F.silu(gate),)


def multi_lora(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (base_out + _of_sample(scale, x) * ((x @ A) @ B),)


def _noise(like: Tensor, seed: Tensor) -> Tensor:
    """The stream itself has tests of its own."""
    return ops.normal_noise(like.double(), seed).to(like.dtype)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """0 for nothing."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def _of_sample(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _of_token(modulation: Tensor, x: Tensor) -> Tensor:
    """[D], [B, D], and what broadcasts beside x [B, ..., D] as it is."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation

"""Every op in eager PyTorch, as a trainer writes it: broadcasts and autograd, in the dtype of the tensors.

Keywords are those of ``dmdr_fast.ops``. These are the baseline, not a truth: the gate compares with float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.ops import SDEStep


def renoise(
    x0: Tensor, alpha: Tensor, sigma: Tensor, *, seed: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """x_t = (1 - t) x0 + t noise; the noise is drawn in x0's dtype."""
    if noise is None:
        noise = torch.randn_like(x0)
    return _per_sample(alpha, x0) * x0 + _per_sample(sigma, x0) * noise


def normal_noise(shape_like: Tensor, seed: Tensor) -> Tensor:
    """randn in the latents' dtype."""
    return torch.randn_like(shape_like)


def dmd_loss(
    x0: Tensor,
    x_t: Tensor,
    pred_fake: Tensor,
    pred_real: Tensor,
    pred_real_uncond: Tensor,
    *,
    sigma: Tensor,
    cfg_scale: float,
) -> Tensor:
    """The loss of the public DMD trainers: denoised samples, guidance, normaliser, pseudo-target, mse."""
    with torch.no_grad():
        t = _per_sample(sigma, x0)
        guided = pred_real_uncond + cfg_scale * (pred_real - pred_real_uncond)
        p_fake = x0 - (x_t - t * pred_fake)
        p_real = x0 - (x_t - t * guided)
        weight = p_real.abs().mean(dim=tuple(range(1, x0.dim())), keepdim=True)
        grad = torch.nan_to_num((p_real - p_fake) / (weight + 1e-8))
    return 0.5 * F.mse_loss(x0.float(), (x0 - grad).detach().float())


class RewardPreprocessing(nn.Module):
    """Clamp, resize, normalise, with the mean and the deviation [C] as buffers.

    The antialiased resize has no bfloat16 on a CPU, so it runs in float32 there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: Tensor, size: int) -> Tensor:
        unit = (image.clamp(-1, 1) + 1) / 2
        if image.device.type == "cpu" and image.dtype is torch.bfloat16:
            unit = unit.float()
        resized = F.interpolate(unit, size=(size, size), mode="bicubic", antialias=True).to(image.dtype)
        return (resized - self.mean) / self.std


def sde_step_logprob(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    kind: str,
    eta: float,
    next_sample: Tensor | None = None,
    seed: Tensor | None = None,
) -> SDEStep:
    """The step of Flow-GRPO's trainers (kind "flow_grpo"), in float32 as they have it."""
    x, v, dtype = x.float(), v.float(), x.dtype
    t, dt = _per_sample(sigma, x), _per_sample(sigma_next - sigma, x)
    std_dev = torch.sqrt(t / (1 - torch.where(t == 1, _per_sample(sigma_next, x), t))) * eta
    mean = x * (1 + std_dev**2 / (2 * t) * dt) + v * (1 + std_dev**2 * (1 - t) / (2 * t)) * dt
    std = std_dev * torch.sqrt(-dt)
    if next_sample is None:
        next_sample = (mean + std * torch.randn_like(mean)).to(dtype)
    logprob = (
        -((next_sample.detach().float() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    )
    return SDEStep(next_sample, logprob.mean(dim=tuple(range(1, x.dim()))), mean, std.flatten())


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """DiT's modulate(norm(x), shift, scale)."""
    normal = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h."""
    return x + gate.unsqueeze(1) * h


def gated_residual_layer_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The end of one branch and the norm that starts the next."""
    residual = gated_residual(x, h, gate)
    return residual, layer_norm_modulate(residual, shift, scale)


def rms_norm_scale(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The way into a branch of Z-Image's blocks."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6) * scale.unsqueeze(1)


def gated_residual_rms_norm(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """The way out of one."""
    return x + gate.unsqueeze(1) * F.rms_norm(h, (h.shape[-1],), weight, eps=1e-6)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS norm of queries and keys, then rotary embedding in float32, as the FLUX and Qwen-Image code has it."""
    return _rotated(q, q_weight, cos, sin), _rotated(k, k_weight, cos, sin)


def gelu_mul(packed: Tensor) -> Tensor:
    """GEGLU."""
    value, gate = packed.chunk(2, dim=-1)
    return value * F.gelu(gate)


def silu_mul(packed: Tensor) -> Tensor:
    """SwiGLU."""
    value, gate = packed.chunk(2, dim=-1)
    return value * F.silu(gate)


def multi_lora(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """base_out + scale_b (x A) B."""
    return base_out + _per_sample(scale, x) * ((x @ A) @ B)


def _rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normal = F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)
    even, odd = normal.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (normal.float() * cos.unsqueeze(1) + turned.float() * sin.unsqueeze(1)).to(x.dtype)


def _per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """A scalar per sample in the tensors' dtype, broadcast."""
    return scalar.to(like.dtype).view(-1, *[1] * (like.dim() - 1))

"""Noise paths: how x_t = alpha(t) x0 + sigma(t) noise runs from data at t = 0 to noise at t = 1."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmdr_fast.ops.dmd import Prediction


class Path(Protocol):
    """The coefficients of a path."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), fp32 [B] each, at times t fp32 [B] in [0, 1]."""
        ...


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow: alpha = 1 - t, sigma = t (SiT, SD3, FLUX, Qwen-Image, Z-Image)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t, t


@dataclass(frozen=True)
class VPPath:
    """Variance preserving: alpha = sqrt(abar), sigma = sqrt(1 - abar) of a discrete DDPM schedule (SDXL).

    t in [0, 1] is the schedule's step round(t (T - 1)); at its last one abar is small but not 0, so a clean sample
    can be read from an eps prediction there.
    """

    alphas_cumprod: tuple[float, ...]

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> VPPath:
        """abar of betas that are linear in their root: Stable Diffusion's schedule (arXiv 2112.10752)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
        return cls(tuple((1.0 - betas).cumprod(0).tolist()))

    def index(self, t: Tensor) -> Tensor:
        """The schedule's step int64 [B] at t."""
        last = len(self.alphas_cumprod) - 1
        return (t * last).round().long().clamp(0, last)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = _table(self.alphas_cumprod, t.device)[self.index(t)]
        return abar.sqrt().float(), (1.0 - abar).sqrt().float()


@functools.lru_cache(maxsize=8)
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


FLOW = FlowPath()


def clean_sample(x_t: Tensor, t: Tensor, prediction: Tensor, kind: Prediction = "flow", path: Path = FLOW) -> Tensor:
    """The sample x0_hat that a prediction at x_t means.

    ``flow`` x_t - t v; ``eps`` (x_t - sigma eps) / alpha; ``v`` alpha x_t - sigma v; ``x0`` the prediction itself.

    x_t [B, ...], t fp32 [B], prediction like x_t -> x_t's shape and dtype. On the flow path an eps prediction has no
    x0_hat at t = 1, where the student starts: alpha is 0 there.
    """
    if kind == "x0":
        return prediction
    shape = (-1, *[1] * (x_t.ndim - 1))
    if kind == "flow":
        return x_t - t.to(x_t.dtype).view(shape) * prediction
    alpha, sigma = (c.to(x_t.dtype).view(shape) for c in path.alpha_sigma(t))
    if kind == "eps":
        return (x_t - sigma * prediction) / alpha
    if kind == "v":
        return alpha * x_t - sigma * prediction
    raise ValueError(f"clean_sample: kind must be flow, eps, v or x0, got {kind!r}")

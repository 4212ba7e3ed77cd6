"""Noise paths: how x_t = alpha(t) x0 + sigma(t) noise runs from data at t = 0 to noise at t = 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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


def target(x0: Tensor, noise: Tensor, kind: Prediction = "flow") -> Tensor:
    """The prediction that means x0 at x_t = alpha x0 + sigma noise: ``flow`` noise - x0; ``eps`` noise; ``x0`` x0."""
    if kind == "flow":
        return noise - x0
    if kind in ("eps", "x0"):
        return noise if kind == "eps" else x0
    raise ValueError(f"target: kind must be flow, eps or x0, got {kind!r}")

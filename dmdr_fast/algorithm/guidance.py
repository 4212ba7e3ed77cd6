"""Classifier-free guidance in the forms that diffusion pipelines use."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Mode = Literal["standard", "offset", "per_token"]
MODES = get_args(Mode)


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor, mode: Mode = "standard", token: int = 1) -> Tensor:
    """The guided prediction of c = ``cond`` and u = ``uncond`` [B, ...] at w = ``scale``, a number or [B].

    standard   u + w (c - u)
    offset     c + w (c - u)
    per_token  p |c| / |p| with p = u + w (c - u), 2-norms over each token: all channels of ``token`` x ``token``
               latent pixels of [B, C, H, W] (Qwen-Image; ``token`` divides H and W)

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"guide: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(scale, Tensor):
        scale = scale.view(-1, *[1] * (cond.ndim - 1))
    guided = (cond if mode == "offset" else uncond) + scale * (cond - uncond)
    return guided * (_token_norms(cond, token) / _token_norms(guided, token)) if mode == "per_token" else guided


def _token_norms(x: Tensor, token: int) -> Tensor:
    """The 2-norm of each token of x [B, C, H, W], for each of its pixels: [B, 1, H, W]."""
    squares = x.square().sum(1, keepdim=True).unflatten(3, (-1, token)).unflatten(2, (-1, token))
    norms = squares.sum((3, 5), keepdim=True).sqrt()
    return norms.expand_as(squares).flatten(4, 5).flatten(2, 3)

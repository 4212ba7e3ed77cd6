"""Renoising and the seeded noise it draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.plans import Live
from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, written
from dmdr_fast.ops._noise import seeded_normals
from dmdr_fast.reference import Result, compute_dtype, like, per_sample


def normal_noise(shape_like: Tensor, seed: Tensor, *, offset: int = 0) -> Tensor:
    r"""Standard normal noise that is a pure function of the seed and the element index.

    Element i (row-major, plus ``offset``) is Box-Muller over Philox4x32-10: block i // 4 of the stream gives
    words r0..r3; lanes 0, 1 use (a, b) = (r0, r1), lanes 2, 3 use (r2, r3);

        u = ((a >> 8) + 1) 2^-24,  theta = (b >> 8) 2^-24
        z = sqrt(-2 ln u) cos(2 pi theta) on even lanes, sin(2 pi theta) on odd ones

    with key = (lo32, hi32 of seed[0]) and counter = (lo32, hi32 of the block, lo32, hi32 of seed[1]). The
    integers are the same on every backend and device; the normals agree to about 1e-6. A batch that is split
    over ranks draws the noise of the whole one when each part passes its first element's index as ``offset``.

    Args:
        shape_like: tensor that gives the shape, dtype and device; its values are not read.
        seed: int64 [2] = (key, stream) on the same device. It is read on the device: no sync.
        offset: index of the first element, >= 0.

    Returns:
        Contiguous tensor of shape_like's shape and dtype. Rounded from float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    op = "normal_noise"
    check.floating(op, "shape_like", shape_like, min_dim=0)
    check.seed(op, seed, shape_like, "shape_like")
    check.offset(op, offset)
    return _noise(list(shape_like.shape), seed, offset, shape_like.dtype)


def renoise(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """x_t = alpha_b x0 + sigma_b noise: data moved to noise level sigma.

    Flow matching has alpha = 1 - sigma, DDPM alpha = sqrt(abar), sigma = sqrt(1 - abar).

    Args:
        x0: [B, ...] of any float dtype.
        alpha: [B] (or one number for all), >= 0.
        sigma: [B] (or one number for all), >= 0.
        noise: x0's shape, any float dtype. Exactly one of ``noise`` and ``seed`` is given.
        seed: int64 [2]; the noise is then ``normal_noise(x0, seed, offset=offset)`` before rounding to x0's
            dtype and is never stored.
        offset: index of x0's first element in the seeded stream.

    Returns:
        x_t, contiguous, in x0's dtype; computed in float32 (float64 where x0 or noise is float64).

    Differentiable in x0 and noise, and in alpha and sigma (fixed-order sums over each sample).

    Raises:
        TypeError, ValueError: an argument is not as described; values of alpha and sigma are read only on the
            CPU.

    Source: the forward process of the score pass, DMD2 (arXiv 2405.14867) and DMDR (arXiv 2511.13649).
    """
    op = "renoise"
    check.floating(op, "x0", x0)
    check.offset(op, offset)
    dtype = compute_dtype(x0, noise)
    alpha = check.scalar(op, "alpha", alpha, x0, dtype, minimum=0)
    sigma = check.scalar(op, "sigma", sigma, x0, dtype, minimum=0)
    return _fwd.checked(op, x0, alpha, sigma, noise, seed, offset)


def _check(op: str, a) -> None:
    check.given_or_drawn(op, "noise", a.noise, a.seed, a.x0, "x0")
    for name, scalar in (("alpha", a.alpha), ("sigma", a.sigma)):
        check.per_sample(op, name, scalar, a.x0, "x0")


def _check_values(op: str, a) -> None:
    check.values(op, "alpha", a.alpha, minimum=0)
    check.values(op, "sigma", a.sigma, minimum=0)


def _save(ctx, a, x_t) -> None:
    _, need_alpha, need_sigma, *_ = ctx.needs_input_grad[1:]
    # The latents are kept only where a schedule is learned: alpha needs x0, sigma the noise.
    ctx.save_for_backward(a.alpha, a.sigma, a.x0 if need_alpha else None, a.noise if need_sigma else None, a.seed)
    ctx.options = a.offset, a.x0.dtype, None if a.noise is None else a.noise.dtype


def _backward(ctx, needed, grad) -> dict:
    alpha, sigma, x0, noise, seed = ctx.saved_tensors
    offset, dtype, noise_dtype = ctx.options
    if needed.sigma and noise is None:
        noise = _noise(list(grad.shape), seed, offset, sigma.dtype)
    return {
        "x0": _bwd(grad, alpha, dtype) if needed.x0 else None,
        "noise": _bwd(grad, sigma, noise_dtype) if needed.noise else None,
        "alpha": _scale_bwd(grad, x0) if needed.alpha else None,
        "sigma": _scale_bwd(grad, noise) if needed.sigma else None,
    }


def _formula(
    x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: Live
) -> Tensor:
    compute = compute_dtype(x0, noise)
    if noise is None:
        assert seed is not None  # the check has seen to it
        noise = seeded_normals(list(x0.shape), seed, offset, compute)
    return per_sample(alpha, x0) * x0.to(compute) + per_sample(sigma, x0) * noise.to(compute)


def _formula_bwd(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x0 (scale = alpha) or of the noise (scale = sigma)."""
    return per_sample(scale, grad) * grad.to(scale.dtype)


def _formula_scale_bwd(grad: Tensor, factor: Tensor) -> Tensor:
    """The gradient of alpha (factor = x0) or of sigma (factor = noise)."""
    compute = compute_dtype(grad, factor)
    return (grad.to(compute) * factor.to(compute)).flatten(1).sum(1)


_noise = Raw("normal_noise_fwd", "out", lambda a: Result(a.size, a.dtype), seeded_normals)
_bwd = Raw("renoise_bwd", "out", lambda a: like(a.grad, a.dtype), _formula_bwd)
_scale_bwd = Raw(
    "renoise_scale_bwd", "sample_sum", lambda a: Result(a.grad.shape[:1], compute_dtype(a.grad, a.factor)),
    _formula_scale_bwd,
)  # fmt: skip
_fwd = Raw(
    "renoise_fwd", "out", lambda a: like(a.x0), _formula,
    check=_check, check_values=_check_values, backward=written(_save, _backward),
)  # fmt: skip

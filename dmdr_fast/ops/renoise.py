"""Renoising and the seeded noise it draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define


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
    return _normal_noise_fwd(shape_like.shape, seed, offset, shape_like.dtype)


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
    if (noise is None) == (seed is None):
        raise ValueError(
            f"{op}: noise, seed: expected exactly one of them, got {'both' if seed is not None else 'none'}"
        )
    if noise is not None:
        check.like(op, "noise", noise, x0, "x0")
    else:
        check.seed(op, seed, x0, "x0")
    check.offset(op, offset)
    dtype = check.compute_dtype(x0, noise)
    alpha = check.per_sample(op, "alpha", alpha, x0, "x0", dtype, minimum=0)
    sigma = check.per_sample(op, "sigma", sigma, x0, "x0", dtype, minimum=0)
    return _renoise_fwd(x0, alpha, sigma, noise, seed, offset)


def _save(ctx, inputs, output):
    x0, alpha, sigma, noise, seed, offset = inputs
    _, need_alpha, need_sigma, *_ = ctx.needs_input_grad
    # The latents are kept only where a schedule is learned: alpha needs x0, sigma the noise.
    ctx.save_for_backward(alpha, sigma, x0 if need_alpha else None, noise if need_sigma else None, seed)
    ctx.offset = offset
    ctx.dtype = x0.dtype
    ctx.noise_dtype = None if noise is None else noise.dtype


def _backward(ctx, grad):
    alpha, sigma, x0, noise, seed = ctx.saved_tensors
    need_x0, need_alpha, need_sigma, need_noise, *_ = ctx.needs_input_grad
    grad_x0 = _renoise_bwd(grad, alpha, ctx.dtype) if need_x0 else None
    grad_noise = _renoise_bwd(grad, sigma, ctx.noise_dtype) if need_noise else None
    grad_alpha = _renoise_scale_bwd(grad, x0) if need_alpha else None
    grad_sigma = None
    if need_sigma:
        if noise is None:
            noise = _normal_noise_fwd(grad.shape, seed, ctx.offset, sigma.dtype)
        grad_sigma = _renoise_scale_bwd(grad, noise)
    return grad_x0, grad_alpha, grad_sigma, grad_noise, None, None


def _contiguous_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape, dtype=dtype)


_normal_noise_fwd = define(
    "normal_noise_fwd(SymInt[] size, Tensor seed, SymInt offset, ScalarType dtype) -> Tensor",
    lambda size, seed, offset, dtype: seed.new_empty(size, dtype=dtype),
)
_renoise_bwd = define(
    "renoise_bwd(Tensor grad, Tensor scale, ScalarType dtype) -> Tensor",
    lambda grad, scale, dtype: _contiguous_like(grad, dtype),
)
_renoise_scale_bwd = define(
    "renoise_scale_bwd(Tensor grad, Tensor factor) -> Tensor",
    lambda grad, factor: grad.new_empty(grad.shape[:1], dtype=check.compute_dtype(grad, factor)),
)
_renoise_fwd = define(
    "renoise_fwd(Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? seed, SymInt offset) -> Tensor",
    lambda x0, alpha, sigma, noise, seed, offset: _contiguous_like(x0, x0.dtype),
    setup_context=_save,
    backward=_backward,
)

"""Renoising and seeded noise on the CPU kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.cpu.library import contiguous_float, kernel, new_float, new_output, pointer
from dmdr_fast.backends.views import ABSENT, shared_view

_fwd = kernel("renoise_fwd", "dmdr_renoise_args")
_bwd = kernel("renoise_bwd", "dmdr_renoise_args")
_scale_bwd = kernel("renoise_scale_bwd", "dmdr_renoise_args")


def normal_noise_fwd(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.normal_noise_fwd`; agrees with it to 1e-6."""
    noise = new_output(size, dtype)
    seed = seed.contiguous()
    shape, (out,), _ = shared_view(noise.view(1, math.prod(size)))
    _fwd(*shape, *ABSENT, *ABSENT, *out, 0, 0, seed.data_ptr(), offset, 0)
    return noise


def renoise_fwd(
    x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int
) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_fwd`."""
    x_t = new_output(x0.shape, x0.dtype)
    alpha, sigma = contiguous_float(alpha), contiguous_float(sigma)
    seed = None if seed is None else seed.contiguous()
    shape, (x0, noise, out), _held = shared_view(x0, noise, x_t)
    _fwd(*shape, *x0, *noise, *out, alpha.data_ptr(), sigma.data_ptr(), pointer(seed), offset, 0)
    return x_t


def renoise_bwd(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_bwd`."""
    result = new_output(grad.shape, dtype)
    scale = contiguous_float(scale)
    shape, (grad, out), _held = shared_view(grad, result)
    _bwd(*shape, *grad, *ABSENT, *out, scale.data_ptr(), 0, 0, 0, 0)
    return result


def renoise_scale_bwd(grad: Tensor, factor: Tensor) -> Tensor:
    """See :func:`dmdr_fast.reference.renoise_scale_bwd`."""
    result = new_float(grad.shape[:1])
    shape, (grad, factor), _held = shared_view(grad, factor)
    _scale_bwd(*shape, *grad, *factor, *ABSENT, 0, 0, 0, 0, result.data_ptr())
    return result

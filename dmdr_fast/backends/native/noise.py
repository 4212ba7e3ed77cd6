"""Renoising and seeded noise on the kernels of csrc/."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.views import Strided, shared_view


@implements("normal_noise_fwd", entry="renoise_fwd")
def normal_noise_fwd(run: Calls, a) -> Tensor:
    noise = run.new(a.size, a.dtype)
    count = math.prod(a.size)
    run.call(
        "renoise_fwd", "dmdr_renoise_args", shape=(1, 1, 1, 1, 1, count), out=Strided(noise, (count,)),
        seed=a.seed.contiguous(), offset=a.offset,
    )  # fmt: skip
    return noise


@implements("renoise_fwd")
def renoise_fwd(run: Calls, a) -> Tensor:
    x_t = run.new(a.x0.shape, a.x0.dtype)
    view = shared_view(a.x0, a.noise, x_t)
    x0, noise, out = view.strided()
    run.call(
        "renoise_fwd", "dmdr_renoise_args", shape=view.shape, x0=x0, noise=noise, out=out,
        alpha=run.scalars(a.alpha), sigma=run.scalars(a.sigma),
        seed=None if a.seed is None else a.seed.contiguous(), offset=a.offset,
    )  # fmt: skip
    return x_t


@implements("renoise_bwd")
def renoise_bwd(run: Calls, a) -> Tensor:
    result = run.new(a.grad.shape, a.dtype)
    view = shared_view(a.grad, result)
    grad, out = view.strided()
    run.call("renoise_bwd", "dmdr_renoise_args", shape=view.shape, x0=grad, out=out, alpha=run.scalars(a.scale))
    return result


@implements("renoise_scale_bwd")
def renoise_scale_bwd(run: Calls, a) -> Tensor:
    if a.grad.numel() == 0:
        return run.filled(a.grad.shape[:1], 0, torch.float32)
    result = run.new(a.grad.shape[:1], torch.float32)
    view = shared_view(a.grad, a.factor)
    grad, factor = view.strided()
    run.call("renoise_scale_bwd", "dmdr_renoise_args", shape=view.shape, x0=grad, noise=factor, sample_sum=result)
    return result

"""SDE steps with their log-probabilities and the clipped policy loss on the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.cpu.library import contiguous_float, kernel, new_float, new_output, pointer, workspace
from dmdr_fast.backends.views import ABSENT, shared_view

_space = workspace("sde_step", 2, torch.float64)
_step_fwd = kernel("sde_step_fwd", "dmdr_sde_step_args")
_step_bwd = kernel("sde_step_bwd", "dmdr_sde_step_args")
_loss_fwd = kernel("grpo_loss_fwd", "dmdr_grpo_loss_args")
_loss_bwd = kernel("grpo_loss_bwd", "dmdr_grpo_loss_args")

_KIND = {"flow_grpo": 0, "dance": 1, "cps": 2}


def sde_step_fwd(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    next_sample: Tensor | None,
    seed: Tensor | None,
    offset: int,
    kind: str,
    eta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.sde_step_fwd`."""
    drawn = x.new_empty(0) if seed is None else new_output(x.shape, x.dtype)
    result = new_output(x.shape, torch.float32)
    logprob, std = (new_float(x.shape[:1]) for _ in range(2))
    sigma, sigma_next = contiguous_float(sigma), contiguous_float(sigma_next)
    seed = None if seed is None else seed.contiguous()
    shape, fields, _held = shared_view(x, v, drawn if next_sample is None else next_sample, result)
    space = _space(shape[0] * shape[1] * shape[2] * shape[3] * shape[4], shape[5])
    x, v, next_sample, mean = fields
    _step_fwd(
        *shape, *x, *v, *next_sample, *mean, *ABSENT * 4,
        sigma.data_ptr(), sigma_next.data_ptr(), pointer(seed), offset, _KIND[kind], eta,
        logprob.data_ptr(), std.data_ptr(), 0, space.data_ptr(),
    )  # fmt: skip
    return drawn, logprob, result, std


def sde_step_bwd(
    grad_next: Tensor | None,
    grad_logprob: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    next_sample: Tensor,
    kind: str,
    eta: float,
    need_x: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.sde_step_bwd`."""
    result_x = new_output(x.shape, x.dtype) if need_x else x.new_empty(0)
    result_v = new_output(v.shape, v.dtype) if need_v else v.new_empty(0)
    sigma, sigma_next = contiguous_float(sigma), contiguous_float(sigma_next)
    grad_logprob = contiguous_float(grad_logprob)
    shape, fields, _held = shared_view(
        x, v, next_sample, grad_next, grad_mean, result_x if need_x else None, result_v if need_v else None
    )
    x, v, next_sample, grad_next, grad_mean, grad_x, grad_v = fields
    _step_bwd(
        *shape, *x, *v, *next_sample, *ABSENT, *grad_next, *grad_mean, *grad_x, *grad_v,
        sigma.data_ptr(), sigma_next.data_ptr(), 0, 0, _KIND[kind], eta, 0, 0, pointer(grad_logprob), 0,
    )  # fmt: skip
    return result_x, result_v


def grpo_loss_fwd(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.grpo_loss_fwd`."""
    loss, stats = new_float(()), new_float(4)
    inputs = [contiguous_float(tensor) for tensor in (logprob, old_logprob, advantage)]
    _loss_fwd(
        logprob.numel(), *[tensor.data_ptr() for tensor in inputs], clip_low, clip_high, adv_clip,
        loss.data_ptr(), stats.data_ptr(), 0, 0,
    )  # fmt: skip
    return loss, stats


def grpo_loss_bwd(
    grad_loss: Tensor,
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
) -> Tensor:
    """See :func:`dmdr_fast.reference.grpo_loss_bwd`."""
    grad = new_float(logprob.shape)
    inputs = [contiguous_float(tensor) for tensor in (logprob, old_logprob, advantage)]
    grad_loss = contiguous_float(grad_loss)
    _loss_bwd(
        logprob.numel(), *[tensor.data_ptr() for tensor in inputs], clip_low, clip_high, adv_clip,
        0, 0, grad_loss.data_ptr(), grad.data_ptr(),
    )  # fmt: skip
    return grad.to(logprob.dtype)

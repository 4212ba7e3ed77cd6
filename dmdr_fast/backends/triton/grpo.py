"""The clipped policy loss on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import cdiv, launch
from dmdr_fast.kernels.grpo_loss import grpo_loss_bwd_kernel, grpo_loss_kernel


def grpo_loss_fwd(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.grpo_loss_fwd`."""
    loss, stats = logprob.new_empty((), dtype=torch.float32), logprob.new_empty(4, dtype=torch.float32)
    launch(
        grpo_loss_kernel, (1,), *_flat(logprob, old_logprob, advantage), loss, stats, logprob.numel(),
        clip_low, clip_high, adv_clip, BLOCK=512,
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
    grad = logprob.new_empty(logprob.shape)
    count = logprob.numel()
    launch(
        grpo_loss_bwd_kernel, (cdiv(count, 512),), grad_loss, *_flat(logprob, old_logprob, advantage), grad, count,
        clip_low, clip_high, adv_clip, BLOCK=512,
    )  # fmt: skip
    return grad


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)

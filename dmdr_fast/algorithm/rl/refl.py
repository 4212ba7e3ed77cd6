"""ReFL: the reward's own gradient on x0, through the decoder, chunk by chunk.

Source: ImageReward (arXiv 2304.05977), as DMDR uses it: maximise R(decode(x0)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]  # latent [B, ...] -> image [B, C, H, W] in about [-1, 1]


def refl_leaf_gradient(
    x0: Tensor, decode: Decode, reward: Callable[[Tensor, slice], Tensor], *, chunk: int
) -> tuple[Tensor, Tensor]:
    """d(-mean R)/d(x0) on the leaf x0 [B, ...], and the rewards fp32 [B], both detached.

    ``reward(images, rows)`` gets the images of ``rows`` of the batch and returns [rows] rewards, higher is better.
    The graph of one chunk is freed before the next is built: peak memory is that of ``chunk`` samples.
    """
    gradient, rewards = torch.empty_like(x0), x0.new_empty(x0.shape[0], dtype=torch.float32)
    for start in range(0, x0.shape[0], chunk):
        rows = slice(start, min(start + chunk, x0.shape[0]))
        with torch.enable_grad():
            leaf = x0[rows].detach().requires_grad_()
            values = reward(decode(leaf), rows)
            (gradient[rows],) = torch.autograd.grad(-values.sum() / x0.shape[0], leaf)
        rewards[rows] = values.detach()
    return gradient, rewards

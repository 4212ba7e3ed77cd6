"""dmd_gradient through dmd_loss, forward and backward, with CFG: what a generator update asks of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import DTYPES, TOKENS, Case, latent_shapes, per_sample, tensor_bytes


def dmd_loss(
    x0: Tensor,
    x_t: Tensor,
    pred_fake: Tensor,
    pred_real: Tensor,
    pred_real_uncond: Tensor,
    *,
    sigma: Tensor,
    cfg_scale: float,
) -> Tensor:
    """The loss of the public DMD trainers: denoised samples, guidance, normaliser, pseudo-target, mse."""
    with torch.no_grad():
        t = per_sample(sigma, x0)
        guided = pred_real_uncond + cfg_scale * (pred_real - pred_real_uncond)
        p_fake = x0 - (x_t - t * pred_fake)
        p_real = x0 - (x_t - t * guided)
        weight = p_real.abs().mean(dim=tuple(range(1, x0.dim())), keepdim=True)
        grad = torch.nan_to_num((p_real - p_fake) / (weight + 1e-8))
    return 0.5 * F.mse_loss(x0.float(), (x0 - grad).detach().float())


@pytest.mark.parametrize("shape", (*latent_shapes(), TOKENS), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dmd_loss(bench, shape, dtype):
    # A backward that finds 1 as the loss's incoming gradient has nothing to do. On a GPU that number is on the device,
    # and a kernel multiplies by it.
    backward = 2 if torch.cuda.is_available() else 0
    latents = ("x0", "x_t", "pred_fake", "pred_real", "pred_real_uncond")

    def tensors(inputs):
        return {name: inputs.normal(*shape) for name in latents} | {"sigma": inputs.uniform(0.02, 0.98, shape[0])}

    bench(
        Case(
            "dmd_loss",
            shape,
            dtype,
            tensors,
            dmd_loss,
            forward_bytes=tensor_bytes(6, shape, dtype),
            backward_bytes=tensor_bytes(backward, shape, dtype),
            wrt=("x0",),
            options={"cfg_scale": 4.0},
        )
    )

"""dmd_gradient through dmd_loss, forward and backward, with CFG: what a generator update asks of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.case import DTYPES, TOKENS, Case, latent_shapes, tensor_bytes


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
            eager.dmd_loss,
            forward_bytes=tensor_bytes(6, shape, dtype),
            backward_bytes=tensor_bytes(backward, shape, dtype),
            wrt=("x0",),
            options={"cfg_scale": 4.0},
        )
    )

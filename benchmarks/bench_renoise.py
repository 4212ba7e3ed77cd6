"""renoise: the noise is drawn inside the kernel (`seed`), beside eager's randn and two products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.case import DTYPES, Case, latent_shapes, per_sample, tensor_bytes


def renoise(
    x0: Tensor, alpha: Tensor, sigma: Tensor, *, seed: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """x_t = (1 - t) x0 + t noise; the noise is drawn in x0's dtype."""
    if noise is None:
        noise = torch.randn_like(x0)
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise


@pytest.mark.parametrize("shape", latent_shapes(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renoise(bench, shape, dtype):
    def tensors(inputs):
        sigma = inputs.uniform(0.02, 0.98, shape[0])
        return {"x0": inputs.normal(*shape), "alpha": 1 - sigma, "sigma": sigma, "seed": inputs.seed()}

    bench(
        Case(
            "renoise",
            shape,
            dtype,
            tensors,
            renoise,
            forward_bytes=tensor_bytes(2, shape, dtype),
            backward_bytes=tensor_bytes(2, shape, dtype),
            wrt=("x0",),
            variant="seed",
            own_noise=True,
        )
    )


@pytest.mark.parametrize("shape", latent_shapes(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renoise_by_given_noise(bench, shape, dtype):
    def tensors(inputs):
        sigma = inputs.uniform(0.02, 0.98, shape[0])
        return {
            "x0": inputs.normal(*shape),
            "alpha": 1 - sigma,
            "sigma": sigma,
            "noise": inputs.normal(*shape),
        }

    bench(
        Case(
            "renoise",
            shape,
            dtype,
            tensors,
            renoise,
            forward_bytes=tensor_bytes(3, shape, dtype),
            backward_bytes=tensor_bytes(2, shape, dtype),
            wrt=("x0",),
            variant="noise",
            note="both read and write each tensor once; torch.compile's generated code stores through the cache",
        )
    )

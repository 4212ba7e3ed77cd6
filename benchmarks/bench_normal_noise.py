"""normal_noise: seeded normals that any backend repeats, beside torch.randn's own stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.case import DTYPES, Case, latent_shapes, tensor_bytes


def normal_noise(shape_like: Tensor, seed: Tensor) -> Tensor:
    """randn in the latents' dtype."""
    return torch.randn_like(shape_like)


@pytest.mark.parametrize("shape", latent_shapes(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_noise(bench, shape, dtype):
    bench(
        Case(
            "normal_noise",
            shape,
            dtype,
            lambda inputs: {"shape_like": inputs.normal(*shape), "seed": inputs.seed()},
            normal_noise,
            forward_bytes=tensor_bytes(1, shape, dtype),
            own_noise=True,
        )
    )

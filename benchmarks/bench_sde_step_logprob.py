"""sde_step_logprob: the sampling of a rollout (`seed`) and the replay that is trained (`next_sample`)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.case import DTYPES, Case, latent_shapes, per_sample, tensor_bytes
from dmdr_fast.ops import SDEStep

OPTIONS = {"kind": "flow_grpo", "eta": 0.7}


def sde_step_logprob(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    kind: str,
    eta: float,
    next_sample: Tensor | None = None,
    seed: Tensor | None = None,
) -> SDEStep:
    """The step of Flow-GRPO's trainers (kind "flow_grpo"), in float32 as they have it."""
    x, v, dtype = x.float(), v.float(), x.dtype
    t, dt = per_sample(sigma, x), per_sample(sigma_next - sigma, x)
    std_dev = torch.sqrt(t / (1 - torch.where(t == 1, per_sample(sigma_next, x), t))) * eta
    mean = x * (1 + std_dev**2 / (2 * t) * dt) + v * (1 + std_dev**2 * (1 - t) / (2 * t)) * dt
    std = std_dev * torch.sqrt(-dt)
    if next_sample is None:
        next_sample = (mean + std * torch.randn_like(mean)).to(dtype)
    logprob = (
        -((next_sample.detach().float() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    )
    return SDEStep(next_sample, logprob.mean(dim=tuple(range(1, x.dim()))), mean, std.flatten())


def times(inputs, batch):
    sigma = inputs.uniform(0.5, 0.95, batch)
    return {"sigma": sigma, "sigma_next": sigma - 0.1}


@pytest.mark.parametrize("shape", latent_shapes(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampling(bench, shape, dtype):
    def tensors(inputs):
        latents = {"x": inputs.normal(*shape), "v": inputs.normal(*shape), "seed": inputs.seed()}
        return latents | times(inputs, shape[0])

    bench(
        Case(
            "sde_step_logprob",
            shape,
            dtype,
            tensors,
            sde_step_logprob,
            forward_bytes=tensor_bytes(3, shape, dtype) + tensor_bytes(1, shape, torch.float32),
            options=OPTIONS,
            outputs=("next_sample", "mean"),
            variant="sampling",
            own_noise=True,
        )
    )


@pytest.mark.parametrize("shape", latent_shapes(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replay(bench, shape, dtype):
    def tensors(inputs):
        latents = {name: inputs.normal(*shape) for name in ("x", "v", "next_sample")}
        return latents | times(inputs, shape[0])

    bench(
        Case(
            "sde_step_logprob",
            shape,
            dtype,
            tensors,
            sde_step_logprob,
            # The mean is a result in float32; the backward makes the velocity's gradient of x, v and next_sample.
            forward_bytes=tensor_bytes(3, shape, dtype) + tensor_bytes(1, shape, torch.float32),
            backward_bytes=tensor_bytes(4, shape, dtype),
            wrt=("v",),
            options=OPTIONS,
            outputs=("logprob",),
            variant="replay",
            note="both read and write each tensor once and are bound by memory",
        )
    )

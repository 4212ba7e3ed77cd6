"""sde_step_logprob: the sampling of a rollout (`seed`) and the replay that is trained (`next_sample`)."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.case import DTYPES, Case, latent_shapes, tensor_bytes

OPTIONS = {"kind": "flow_grpo", "eta": 0.7}


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
            eager.sde_step_logprob,
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
            eager.sde_step_logprob,
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

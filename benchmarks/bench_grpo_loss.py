"""grpo_loss: a few log-probs; what counts is the number of launches."""

from __future__ import annotations

import torch

from benchmarks import eager
from benchmarks.case import Case, tensor_bytes

SAMPLES = (256,)


def test_grpo_loss(bench):
    def tensors(inputs):
        old = inputs.normal(*SAMPLES)
        return {
            "logprob": old + 1e-4 * inputs.normal(*SAMPLES),
            "old_logprob": old,
            "advantage": inputs.normal(*SAMPLES),
        }

    bench(
        Case(
            "grpo_loss",
            SAMPLES,
            torch.float32,
            tensors,
            eager.grpo_loss,
            forward_bytes=tensor_bytes(3, SAMPLES, torch.float32),
            backward_bytes=tensor_bytes(4, SAMPLES, torch.float32),
            wrt=("logprob",),
            options={"clip_low": 1e-4, "clip_high": 1e-4},
            outputs=("loss",),
        )
    )

"""multi_lora on a square projection, the batch [fake | real | real | real] with DynaDG's two scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.case import DTYPES, TOKENS, Case, per_sample, tensor_bytes

RANKS = (32, 128)


def multi_lora(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """base_out + scale_b (x A) B."""
    return base_out + per_sample(scale, x) * ((x @ A) @ B)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_lora(bench, dtype, rank):
    width = TOKENS[-1]

    def tensors(inputs):
        return {
            "x": inputs.normal(*TOKENS),
            "base_out": inputs.normal(*TOKENS),
            "A": inputs.normal(width, rank) * width**-0.5,
            "B": inputs.normal(rank, width) * rank**-0.5,
            "scale": torch.tensor([2.0, 0.75, 0.75, 0.75], device=inputs.device),
        }

    bench(
        Case(
            "multi_lora",
            TOKENS,
            dtype,
            tensors,
            multi_lora,
            forward_bytes=tensor_bytes(3, TOKENS, dtype),
            backward_bytes=tensor_bytes(3, TOKENS, dtype),  # base_out's gradient is the incoming one itself
            wrt=("x", "base_out", "A", "B"),
            variant=f"rank {rank}",
            note="matrix products are most of it, and oneDNN's bfloat16 ones are better tuned",
        )
    )

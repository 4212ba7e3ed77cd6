"""multi_lora: rank 32 on a square projection, the batch [fake | real | real | real] with DynaDG's two scales."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes

RANK = 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_lora(bench, dtype):
    width = TOKENS[-1]

    def tensors(inputs):
        return {
            "x": inputs.normal(*TOKENS),
            "base_out": inputs.normal(*TOKENS),
            "A": inputs.normal(width, RANK) * width**-0.5,
            "B": inputs.normal(RANK, width) * RANK**-0.5,
            "scale": torch.tensor([2.0, 0.75, 0.75, 0.75], device=inputs.device),
        }

    bench(
        Case(
            "multi_lora",
            TOKENS,
            dtype,
            tensors,
            eager.multi_lora,
            forward_bytes=tensor_bytes(3, TOKENS, dtype),
            backward_bytes=tensor_bytes(3, TOKENS, dtype),  # base_out's gradient is the incoming one itself
            wrt=("x", "base_out", "A", "B"),
        )
    )

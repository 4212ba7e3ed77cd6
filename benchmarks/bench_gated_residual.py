"""gated_residual: the end of an adaLN-Zero branch, one gate per sample."""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h."""
    return x + gate.unsqueeze(1) * h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual(bench, dtype):
    batch, _, width = TOKENS

    def tensors(inputs):
        return {"x": inputs.normal(*TOKENS), "h": inputs.normal(*TOKENS), "gate": inputs.normal(batch, width)}

    bench(
        Case(
            "gated_residual",
            TOKENS,
            dtype,
            tensors,
            gated_residual,
            forward_bytes=tensor_bytes(3, TOKENS, dtype),
            backward_bytes=tensor_bytes(3, TOKENS, dtype),  # x's gradient is the incoming one itself
            wrt=("x", "h", "gate"),
        )
    )

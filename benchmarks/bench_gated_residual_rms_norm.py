"""gated_residual_rms_norm: the way out of a branch between two RMS norms, one gate per sample."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


def gated_residual_rms_norm(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """The way out of one."""
    return x + gate.unsqueeze(1) * F.rms_norm(h, (h.shape[-1],), weight, eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual_rms_norm(bench, dtype):
    batch, _, width = TOKENS

    def tensors(inputs):
        gate, weight = inputs.normal(batch, width), inputs.normal(width)
        return {"x": inputs.normal(*TOKENS), "h": inputs.normal(*TOKENS), "gate": gate, "weight": weight}

    bench(
        Case(
            "gated_residual_rms_norm",
            TOKENS,
            dtype,
            tensors,
            gated_residual_rms_norm,
            forward_bytes=tensor_bytes(3, TOKENS, dtype),
            backward_bytes=tensor_bytes(3, TOKENS, dtype),  # x's gradient is the incoming one itself
            wrt=("x", "h", "gate", "weight"),
        )
    )

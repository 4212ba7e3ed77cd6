"""rms_norm_scale: the way into a branch between two RMS norms, one scale per sample."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


def rms_norm_scale(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The way into a branch of Z-Image's blocks."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6) * scale.unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_scale(bench, dtype):
    batch, _, width = TOKENS

    def tensors(inputs):
        return {"x": inputs.normal(*TOKENS), "weight": inputs.normal(width), "scale": inputs.normal(batch, width)}

    bench(
        Case(
            "rms_norm_scale",
            TOKENS,
            dtype,
            tensors,
            rms_norm_scale,
            forward_bytes=tensor_bytes(2, TOKENS, dtype),
            backward_bytes=tensor_bytes(3, TOKENS, dtype),
            wrt=("x", "weight", "scale"),
        )
    )

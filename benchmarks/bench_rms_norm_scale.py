"""rms_norm_scale: the way into a branch between two RMS norms, one scale per sample."""

from __future__ import annotations

import pytest

from benchmarks import eager
from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


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
            eager.rms_norm_scale,
            forward_bytes=tensor_bytes(2, TOKENS, dtype),
            backward_bytes=tensor_bytes(3, TOKENS, dtype),
            wrt=("x", "weight", "scale"),
        )
    )

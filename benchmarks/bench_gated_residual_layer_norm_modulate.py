"""gated_residual_layer_norm_modulate: between two branches of a transformer block."""

from __future__ import annotations

import pytest

from benchmarks import eager
from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual_layer_norm_modulate(bench, dtype):
    batch, _, width = TOKENS

    def tensors(inputs):
        streams = {name: inputs.normal(*TOKENS) for name in ("x", "h")}
        return streams | {name: inputs.normal(batch, width) for name in ("gate", "shift", "scale")}

    bench(
        Case(
            "gated_residual_layer_norm_modulate",
            TOKENS,
            dtype,
            tensors,
            eager.gated_residual_layer_norm_modulate,
            forward_bytes=tensor_bytes(4, TOKENS, dtype),
            backward_bytes=tensor_bytes(6, TOKENS, dtype),
            wrt=("x", "h", "gate", "shift", "scale"),
            outputs=("residual", "modulated"),
        )
    )

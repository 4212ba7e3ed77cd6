"""gated_residual_layer_norm_modulate: between two branches of a transformer block."""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.bench_gated_residual import gated_residual
from benchmarks.bench_layer_norm_modulate import layer_norm_modulate
from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


def gated_residual_layer_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The end of one branch and the norm that starts the next."""
    residual = gated_residual(x, h, gate)
    return residual, layer_norm_modulate(residual, shift, scale)


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
            gated_residual_layer_norm_modulate,
            forward_bytes=tensor_bytes(4, TOKENS, dtype),
            backward_bytes=tensor_bytes(6, TOKENS, dtype),
            wrt=("x", "h", "gate", "shift", "scale"),
            outputs=("residual", "modulated"),
        )
    )

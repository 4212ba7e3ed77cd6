"""layer_norm_modulate: adaLN of a transformer block, one shift and one scale per sample."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """DiT's modulate(norm(x), shift, scale)."""
    normal = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_modulate(bench, dtype):
    batch, _, width = TOKENS

    def tensors(inputs):
        return {
            "x": inputs.normal(*TOKENS),
            "shift": inputs.normal(batch, width),
            "scale": inputs.normal(batch, width),
        }

    bench(
        Case(
            "layer_norm_modulate",
            TOKENS,
            dtype,
            tensors,
            layer_norm_modulate,
            forward_bytes=tensor_bytes(2, TOKENS, dtype),
            backward_bytes=tensor_bytes(3, TOKENS, dtype),
            wrt=("x", "shift", "scale"),
        )
    )

"""qk_norm_rope: queries and keys as views of a packed projection, 24 heads of 64."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes

HEAD = 64


def rotation(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, HEAD] of rotary positions, pairs repeated."""
    frequency = 10000.0 ** (-torch.arange(0, HEAD, 2, device=device) / HEAD)
    angle = (torch.arange(length, device=device)[:, None] * frequency).repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope(bench, dtype):
    batch, length, width = TOKENS

    def tensors(inputs):
        packed = inputs.normal(batch, length, 3 * width)
        q, k, _ = packed.unflatten(-1, (3, width // HEAD, HEAD)).unbind(2)
        cos, sin = rotation(length, inputs.device)
        weights = {name: 1 + 0.1 * inputs.normal(HEAD) for name in ("q_weight", "k_weight")}
        return {"q": q, "k": k, "cos": cos, "sin": sin} | weights

    bench(
        Case(
            "qk_norm_rope",
            (batch, length, width // HEAD, HEAD),
            dtype,
            tensors,
            eager.qk_norm_rope,
            forward_bytes=tensor_bytes(2 * 2, TOKENS, dtype),
            backward_bytes=tensor_bytes(2 * 3, TOKENS, dtype),
            wrt=("q", "k", "q_weight", "k_weight"),
            outputs=("q", "k"),
        )
    )

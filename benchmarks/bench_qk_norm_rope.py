"""qk_norm_rope: queries and keys as views of a packed projection, 24 heads of 64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes

HEAD = 64


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS norm of queries and keys, then rotary embedding in float32, as the FLUX and Qwen-Image code has it."""
    return _rotated(q, q_weight, cos, sin), _rotated(k, k_weight, cos, sin)


def _rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normal = F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)
    even, odd = normal.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (normal.float() * cos.unsqueeze(1) + turned.float() * sin.unsqueeze(1)).to(x.dtype)


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
            qk_norm_rope,
            forward_bytes=tensor_bytes(2 * 2, TOKENS, dtype),
            backward_bytes=tensor_bytes(2 * 3, TOKENS, dtype),
            wrt=("q", "k", "q_weight", "k_weight"),
            outputs=("q", "k"),
        )
    )

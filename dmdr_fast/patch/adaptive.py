"""The pieces of an adaLN-Zero block and of one between RMS norms, fused or as the model had them.

``fused`` is the set of ops that a patched block runs. What is not in it is computed by the model's own
expressions, bit for bit. x and h are [B, T, D]; shift, scale and gate [B, 1, D] or [B, T, D].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.patch.rotations import RMSNorm
from dmdr_fast.patch.structure import GATED, GATED_NORM, GATED_RMS, LAYER_NORM, RMS_SCALE

FP16_LIMIT = 65504


def modulated(fused: frozenset[str], norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift."""
    if LAYER_NORM in fused:
        return ops.layer_norm_modulate(x, shift, scale, eps=norm.eps)
    return norm(x) * (1 + scale) + shift


def gated(fused: frozenset[str], x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h."""
    return ops.gated_residual(x, h, gate) if GATED in fused else x + gate * h


def gated_modulated(
    fused: frozenset[str],
    norm: nn.LayerNorm,
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """(r, norm(r) (1 + scale) + shift) with r = x + gate h."""
    if GATED_NORM in fused:
        return ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale, eps=norm.eps)
    residual = gated(fused, x, h, gate)
    return residual, modulated(fused, norm, residual, shift, scale)


def scaled(fused: frozenset[str], norm: RMSNorm, x: Tensor, scale: Tensor) -> Tensor:
    """norm(x) scale, of an RMS norm."""
    if RMS_SCALE in fused:
        return ops.rms_norm_scale(x, norm.weight, scale, eps=norm.eps)
    return norm(x) * scale


def gated_normed(fused: frozenset[str], norm: RMSNorm, x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate norm(h), of an RMS norm."""
    if GATED_RMS in fused:
        return ops.gated_residual_rms_norm(x, h, gate, norm.weight, eps=norm.eps)
    return gated(fused, x, norm(h), gate)


def parts(stream: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The first tokens and the rest, without a copy; autograd sees tensors of their own, not views.

    FSDP2 hangs its hooks on what a block returns, where an in-place operation on a view would lose them.
    """
    first, rest = stream.unsafe_split_with_sizes([tokens, stream.shape[1] - tokens], dim=1)
    return first, rest


def clipped(stream: Tensor) -> Tensor:
    """What a block's stream may be in float16."""
    return stream.clip(-FP16_LIMIT, FP16_LIMIT) if stream.dtype is torch.float16 else stream

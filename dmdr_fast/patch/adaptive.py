"""The three pieces of an adaLN-Zero block, fused or as the model had them.

``fused`` is the set of ops that a patched block runs. What is not in it is computed by the model's own
expressions, bit for bit. x and h are [B, T, D]; shift, scale and gate [B, 1, D] or [B, T, D].
"""

from __future__ import annotations

from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.patch.structure import GATED, GATED_NORM, LAYER_NORM


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

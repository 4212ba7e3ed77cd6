"""Rotary tables as qk_norm_rope reads them, from the complex ones of Z-Image and Qwen-Image."""

from __future__ import annotations

from torch import Tensor


def tables(rotations: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos and sin, pairs repeated, of complex rotations [..., T, D/2].

    Made anew in every layer: fp32 tables of one head against the reads and writes of all heads of q and k.
    """
    if rotations is None:
        return None, None
    return rotations.real.repeat_interleave(2, dim=-1), rotations.imag.repeat_interleave(2, dim=-1)

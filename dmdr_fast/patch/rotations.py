"""Rotary tables as qk_norm_rope reads them: rows of FLUX's, and from the complex ones of Z-Image and Qwen-Image."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dmdr_fast import ops


class RMSNorm(Protocol):
    """diffusers' or torch's, or one of the same attributes; ``weight`` is None where it has none."""

    @property
    def weight(self) -> Tensor | None: ...
    @property
    def eps(self) -> float: ...
    def __call__(self, x: Tensor, /) -> Tensor: ...


def tables(rotations: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos and sin, pairs repeated, of complex rotations [..., T, D/2].

    Made anew in every layer: fp32 tables of one head against the reads and writes of all heads of q and k.
    """
    if rotations is None:
        return None, None
    return rotations.real.repeat_interleave(2, dim=-1), rotations.imag.repeat_interleave(2, dim=-1)


def rotated(
    query: Tensor,
    key: Tensor,
    norm_q: RMSNorm,
    norm_k: RMSNorm,
    rotary: tuple[Tensor, Tensor] | None,
    rows: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Norm and rotation of one stream, which has the ``rows`` of the joint position tables."""
    cos, sin = (None, None) if rotary is None else (table[rows].to(query.device) for table in rotary)
    return ops.qk_norm_rope(query, key, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps)

"""Modules over the ops, with the state_dict of the modules they stand in for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from dmdr_fast.ops.activation import Approximate, gelu_mul, silu_mul
from dmdr_fast.ops.gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from dmdr_fast.ops.layer_norm_modulate import layer_norm_modulate
from dmdr_fast.ops.preprocess import preprocess_reward
from dmdr_fast.ops.qk_norm_rope import qk_norm_rope


class LayerNormModulate(nn.LayerNorm):
    """``modulate(LayerNorm(x), shift, scale)``: see ``layer_norm_modulate``.

    Stands in for ``nn.LayerNorm(dim, elementwise_affine=False)``; has no parameters.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps, elementwise_affine=False)

    # A module of the same state, called with more: what nn.LayerNorm's own callers pass is not enough.
    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return layer_norm_modulate(x, shift, scale, eps=self.eps)


class GatedResidualLayerNormModulate(LayerNormModulate):
    """(x + gate h, its modulated norm): see ``gated_residual_layer_norm_modulate``.

    Stands in for the ``nn.LayerNorm(dim, elementwise_affine=False)`` after a gated branch; has no parameters.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return gated_residual_layer_norm_modulate(x, h, gate, shift, scale, eps=self.eps)


class QKNormRope(nn.Module):
    """RMS norm of q and k and their rotation: see ``qk_norm_rope``.

    ``q_norm`` and ``k_norm`` are ``nn.RMSNorm`` (``q_norm.weight``, ``k_norm.weight``); given ones are used.
    """

    def __init__(
        self,
        head_dim: int,
        eps: float = 1e-6,
        *,
        interleaved: bool = True,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.q_norm = nn.RMSNorm(head_dim, eps=eps) if q_norm is None else q_norm
        self.k_norm = nn.RMSNorm(head_dim, eps=eps) if k_norm is None else k_norm
        self.eps, self.interleaved = eps, interleaved

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q_weight, k_weight = (cast("Tensor | None", norm.weight) for norm in (self.q_norm, self.k_norm))
        return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=self.eps, interleaved=self.interleaved)


class GEGLU(nn.Module):
    """value * gelu(gate) of one projection; the state_dict of diffusers' GEGLU (``proj``)."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True, *, approximate: Approximate = "none"):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mul(self.proj(x), approximate=self.approximate)


class SwiGLU(nn.Module):
    """value * silu(gate) of one projection; the state_dict of diffusers' SwiGLU (``proj``)."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True, *, gate_first: bool = False):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias=bias)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        return silu_mul(self.proj(x), gate_first=self.gate_first)


class PreprocessReward(nn.Module):
    """A reward model's input from images: see ``preprocess_reward``."""

    def __init__(
        self,
        size: int | tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        antialias: bool = True,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ):
        super().__init__()
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.antialias, self.value_range = antialias, value_range

    def forward(self, image: Tensor) -> Tensor:
        return preprocess_reward(
            image, self.size, self.mean, self.std, antialias=self.antialias, value_range=self.value_range
        )

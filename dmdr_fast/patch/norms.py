"""diffusers' adaptive norms: modules that hold the projection of the time embedding and the LayerNorm.

They return parts of one projection. ``unsafe_chunk`` cuts without a copy, as ``chunk`` does, and what it returns is no
view to autograd: see :func:`dmdr_fast.patch.adaptive.parts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.patch.report import Left
from dmdr_fast.patch.structure import LAYER_NORM, Replacement, Site, adaptive_sites, stands_in


@stands_in
class FusedAdaLayerNormZero(AdaLayerNormZero):
    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype=None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).unsafe_chunk(6, dim=1)
        return ops.layer_norm_modulate(x, shift, scale, eps=self.norm.eps), *rest


@stands_in
class FusedAdaLayerNormZeroSingle(AdaLayerNormZeroSingle):
    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).unsafe_chunk(3, dim=1)
        return ops.layer_norm_modulate(x, shift, scale, eps=self.norm.eps), gate


@stands_in
class FusedSD35AdaLayerNormZeroX(SD35AdaLayerNormZeroX):
    """Two modulations of one norm: x is normalised twice, which reads less than the norm written and read."""

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        shift, scale, *middle, shift2, scale2, gate2 = self.linear(self.silu(emb)).unsafe_chunk(9, dim=1)
        first = ops.layer_norm_modulate(hidden_states, shift, scale, eps=self.norm.eps)
        second = ops.layer_norm_modulate(hidden_states, shift2, scale2, eps=self.norm.eps)
        return first, *middle, second, gate2


@stands_in
class FusedAdaLayerNormContinuous(AdaLayerNormContinuous):
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        # A float32 embedding of a bf16 model is rounded before the projection, as in the original.
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).unsafe_chunk(2, dim=1)
        return ops.layer_norm_modulate(x, shift, scale, eps=self.norm.eps)


def _continuous_sites(module: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    if type(module.norm) is not nn.LayerNorm or module.norm.weight is not None:
        if LAYER_NORM in wanted:
            kind = type(module.norm).__name__
            yield Left(LAYER_NORM, "", f"its norm is a {kind} with weights or without mean, the op has neither")
        return
    yield from _sites(module, wanted)


_sites = partial(adaptive_sites, norm="norm")

REPLACEMENTS = (
    Replacement(FusedAdaLayerNormZero, _sites, {"forward": ("26cd95c4f062",)}),
    Replacement(FusedAdaLayerNormZeroSingle, _sites, {"forward": ("694243caf2ba",)}),
    Replacement(FusedSD35AdaLayerNormZeroX, _sites, {"forward": ("1bbd14915fa3",)}),
    Replacement(FusedAdaLayerNormContinuous, _continuous_sites, {"forward": ("15929a9650d3",)}),
)

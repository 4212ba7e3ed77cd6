"""Our SiT (dmdr_fast.models.sit): adaLN-Zero blocks; it has no QK norm and no gated activation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.models.sit import SiT
from dmdr_fast.models.sit_layers import FinalLayer, SiTBlock
from dmdr_fast.patch.adaptive import gated, gated_modulated, modulated
from dmdr_fast.patch.report import Left
from dmdr_fast.patch.structure import Replacement, Site, adaptive_sites, stands_in

MODELS = (SiT,)


@stands_in
class FusedSiTBlock(SiTBlock):
    fused_ops: frozenset[str]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        h = self.attn(modulated(self.fused_ops, self.norm1, x, shift1, scale1))
        x, h = gated_modulated(self.fused_ops, self.norm2, x, h, gate1, shift2, scale2)
        return gated(self.fused_ops, x, self.mlp(h), gate2)


@stands_in
class FusedFinalLayer(FinalLayer):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(ops.layer_norm_modulate(x, shift, scale, eps=self.norm_final.eps))


def _block_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from adaptive_sites(block, wanted, norm="norm1")
    yield from adaptive_sites(block, wanted, branch="attn", norm="norm2")
    yield from adaptive_sites(block, wanted, branch="mlp")


def _final_sites(layer: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from adaptive_sites(layer, wanted, norm="norm_final")


REPLACEMENTS = (Replacement(FusedSiTBlock, _block_sites), Replacement(FusedFinalLayer, _final_sites))

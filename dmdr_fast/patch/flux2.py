"""FLUX.2: double blocks, and single blocks whose attention and feed-forward share their projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2Modulation,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
    _get_qkv_projections,
)
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.patch.adaptive import clipped, gated, gated_modulated, modulated, parts
from dmdr_fast.patch.attention import attend, joint
from dmdr_fast.patch.report import Left
from dmdr_fast.patch.rotations import rotated
from dmdr_fast.patch.structure import SILU_MUL, Replacement, Site, adaptive_sites, qk_sites, stands_in

MODELS = (Flux2Transformer2DModel,)


@stands_in
class FusedFlux2TransformerBlock(Flux2TransformerBlock):
    fused_ops: frozenset[str]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        shift, scale, *image = _modulation(temb_mod_img, 2, hidden_states)
        text_shift, text_scale, *text = _modulation(temb_mod_txt, 2, encoder_hidden_states)
        attended, text_attended = self.attn(
            hidden_states=modulated(self.fused_ops, self.norm1, hidden_states, shift, scale),
            encoder_hidden_states=modulated(
                self.fused_ops, self.norm1_context, encoder_hidden_states, text_shift, text_scale
            ),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = self._finish(hidden_states, attended, image, self.norm2, self.ff)
        encoder_hidden_states = self._finish(
            encoder_hidden_states, text_attended, text, self.norm2_context, self.ff_context
        )
        return clipped(encoder_hidden_states), hidden_states

    def _finish(self, stream: Tensor, attended: Tensor, modulation, norm: nn.LayerNorm, ff: nn.Module) -> Tensor:
        """One stream from its attention on: gated residual, norm, feed-forward, gated residual."""
        gate, shift, scale, gate_ff = modulation
        stream, x = gated_modulated(self.fused_ops, norm, stream, attended, gate, shift, scale)
        return gated(self.fused_ops, stream, ff(x), gate_ff)


@stands_in
class FusedFlux2SingleTransformerBlock(Flux2SingleTransformerBlock):
    fused_ops: frozenset[str]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if encoder_hidden_states is not None:
            text_seq_len = encoder_hidden_states.shape[1]
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = _modulation(temb_mod, 1, hidden_states)
        x = modulated(self.fused_ops, self.norm, hidden_states, shift, scale)
        h = self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        stream = clipped(gated(self.fused_ops, hidden_states, h, gate))
        if not split_hidden_states:
            return stream
        assert text_seq_len is not None
        return parts(stream, text_seq_len)


def _modulation(projected: Tensor, sets: int, stream: Tensor) -> list[Tensor]:
    """Shifts, scales and gates, [B, 1, D] or [B, T, D]; one timestep may serve the whole batch."""
    values = (value for triple in Flux2Modulation.split(projected, sets) for value in triple)
    return [value.expand(stream.shape[0], -1, -1) for value in values]


@stands_in
class FusedFlux2SwiGLU(Flux2SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return ops.silu_mul(x, gate_first=True)


@stands_in
class FusedFlux2AttnProcessor(Flux2AttnProcessor):
    def __call__(
        self,
        attn: Flux2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        projections = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value, _ = joint(attn, projections, image_rotary_emb)
        out = attend(self, query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        text, image = parts(out, encoder_hidden_states.shape[1])
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


@stands_in
class FusedFlux2ParallelSelfAttnProcessor(Flux2ParallelSelfAttnProcessor):
    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        projected = attn.to_qkv_mlp_proj(hidden_states)
        # By their ratio, as the original: under tensor parallelism a rank has its share of each.
        features, mlp_features = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        local = projected.shape[-1] * features // (features + mlp_features)
        qkv, mlp = projected.split([local, projected.shape[-1] - local], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in qkv.chunk(3, dim=-1))
        query, key = rotated(query, key, attn.norm_q, attn.norm_k, image_rotary_emb)
        out = attend(self, query, key, value, attention_mask)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], dim=-1))


def _double_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    for suffix, out in (("", "attn.to_out"), ("_context", "attn.to_add_out")):
        yield from adaptive_sites(block, wanted, norm=f"norm1{suffix}")
        yield from adaptive_sites(block, wanted, branch=out, norm=f"norm2{suffix}")
        yield from adaptive_sites(block, wanted, branch=f"ff{suffix}")


def _single_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from adaptive_sites(block, wanted, norm="norm")
    yield from adaptive_sites(block, wanted, branch="attn")


def _swiglu_sites(module: nn.Module, wanted: frozenset[str]) -> Iterator[Site]:
    if SILU_MUL in wanted:
        yield Site(SILU_MUL)


def _attention_sites(attention: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from qk_sites(attention, wanted, ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"))


REPLACEMENTS = (
    Replacement(FusedFlux2TransformerBlock, _double_sites, {"forward": ("a19e67a213d4",)}),
    Replacement(FusedFlux2SingleTransformerBlock, _single_sites, {"forward": ("5e4ec9f147b8",)}),
    Replacement(FusedFlux2SwiGLU, _swiglu_sites, {"forward": ("1438fab3eeca",)}),
    Replacement(FusedFlux2AttnProcessor, _attention_sites, {"__call__": ("60b93d14ca67", "5dc9fcc3f350")}),
    Replacement(FusedFlux2ParallelSelfAttnProcessor, _attention_sites, {"__call__": ("ccc0a38505d1", "3a1608aa4aa1")}),
)

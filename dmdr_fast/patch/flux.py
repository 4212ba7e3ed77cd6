"""FLUX.1: double blocks (image and text streams), single blocks (both in one), rotary attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
    _get_qkv_projections,
)
from torch import Tensor, nn

from dmdr_fast.patch.adaptive import clipped, gated, gated_modulated, parts
from dmdr_fast.patch.attention import attend, joint
from dmdr_fast.patch.report import Left
from dmdr_fast.patch.structure import Replacement, Site, adaptive_sites, qk_sites, stands_in

MODELS = (FluxTransformer2DModel,)


@stands_in
class FusedFluxTransformerBlock(FluxTransformerBlock):
    fused_ops: frozenset[str]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, *modulation = self.norm1(hidden_states, emb=temb)
        context, *context_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        attended, context_attended, *ip_adapter = self.attn(
            hidden_states=x,
            encoder_hidden_states=context,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = self._finish(hidden_states, attended, modulation, self.norm2, self.ff)
        for attended_images in ip_adapter:
            hidden_states = hidden_states + attended_images
        encoder_hidden_states = self._finish(
            encoder_hidden_states, context_attended, context_modulation, self.norm2_context, self.ff_context
        )
        return clipped(encoder_hidden_states), hidden_states

    def _finish(self, stream: Tensor, attended: Tensor, modulation, norm: nn.LayerNorm, ff: nn.Module) -> Tensor:
        """One stream from its attention on: gated residual, norm, feed-forward, gated residual."""
        gate, shift, scale, gate_ff = (value[:, None] for value in modulation)
        stream, x = gated_modulated(self.fused_ops, norm, stream, attended, gate, shift, scale)
        return gated(self.fused_ops, stream, ff(x), gate_ff)


@stands_in
class FusedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    fused_ops: frozenset[str]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text_tokens = encoder_hidden_states.shape[1]
        stream = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x, gate = self.norm(stream, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(x))
        attended = self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        h = self.proj_out(torch.cat([attended, mlp], dim=2))
        stream = clipped(gated(self.fused_ops, stream, h, gate[:, None]))
        return parts(stream, text_tokens)


@stands_in
class FusedFluxAttnProcessor(FluxAttnProcessor):
    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        projections = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value, text_tokens = joint(attn, projections, image_rotary_emb)
        out = attend(self, query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return out
        text, image = parts(out, text_tokens)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


def _double_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from adaptive_sites(block, wanted, branch="attn.to_out", norm="norm2")
    yield from adaptive_sites(block, wanted, branch="ff")
    yield from adaptive_sites(block, wanted, branch="attn.to_add_out", norm="norm2_context")
    yield from adaptive_sites(block, wanted, branch="ff_context")


def _single_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from adaptive_sites(block, wanted, branch="proj_out")


def _attention_sites(attention: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from qk_sites(attention, wanted, ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"))


REPLACEMENTS = (
    Replacement(FusedFluxTransformerBlock, _double_sites, {"forward": ("521237377e45",)}),
    Replacement(FusedFluxSingleTransformerBlock, _single_sites, {"forward": ("dac8b86a5cdd",)}),
    Replacement(FusedFluxAttnProcessor, _attention_sites, {"__call__": ("24dfb53f625f", "06d16a31022c")}),
)

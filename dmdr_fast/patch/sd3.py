"""Stable Diffusion 3 and 3.5: joint blocks, image and text streams with one attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock, _chunked_feed_forward
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast import ops
from dmdr_fast.patch.adaptive import gated, gated_modulated, parts
from dmdr_fast.patch.report import Left
from dmdr_fast.patch.rotations import RMSNorm
from dmdr_fast.patch.structure import Replacement, Site, adaptive_sites, qk_sites, stands_in

MODELS = (SD3Transformer2DModel,)


@stands_in
class FusedJointTransformerBlock(JointTransformerBlock):
    fused_ops: frozenset[str]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        kwargs = joint_attention_kwargs or {}
        x, gate, shift, scale, gate_ff, *second = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            context, modulation = self.norm1_context(encoder_hidden_states, temb), None
        else:
            context, *modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        attended, context_attended = self.attn(hidden_states=x, encoder_hidden_states=context, **kwargs)

        if second:  # SD3.5 medium: a second attention, of the image with itself
            x2, gate2 = second
            hidden_states = gated(self.fused_ops, hidden_states, attended, gate[:, None])
            attended, gate = self.attn2(hidden_states=x2, **kwargs), gate2
        hidden_states = self._finish(hidden_states, attended, (gate, shift, scale, gate_ff), self.norm2, self.ff)
        if modulation is None:
            return None, hidden_states
        return self._finish(
            encoder_hidden_states, context_attended, modulation, self.norm2_context, self.ff_context
        ), hidden_states

    def _finish(self, stream: Tensor, attended: Tensor, modulation, norm: nn.LayerNorm, ff: nn.Module) -> Tensor:
        """One stream from its attention on: gated residual, norm, feed-forward, gated residual."""
        gate, shift, scale, gate_ff = (value[:, None] for value in modulation)
        stream, x = gated_modulated(self.fused_ops, norm, stream, attended, gate, shift, scale)
        chunk = self._chunk_size
        h = ff(x) if chunk is None else _chunked_feed_forward(ff, x, self._chunk_dim, chunk)
        return gated(self.fused_ops, stream, h, gate_ff)


@stands_in
class FusedSD3SingleTransformerBlock(SD3SingleTransformerBlock):
    fused_ops: frozenset[str]

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        x, *modulation = self.norm1(hidden_states, emb=temb)
        gate, shift, scale, gate_ff = (value[:, None] for value in modulation)
        attended = self.attn(hidden_states=x, encoder_hidden_states=None)
        hidden_states, x = gated_modulated(self.fused_ops, self.norm2, hidden_states, attended, gate, shift, scale)
        return gated(self.fused_ops, hidden_states, self.ff(x), gate_ff)


@stands_in
class FusedJointAttnProcessor(JointAttnProcessor2_0):
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens = hidden_states.shape[1]
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = _normalised(query, key, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            context_query, context_key, context_value = (
                project(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            context_query, context_key = _normalised(context_query, context_key, attn.norm_added_q, attn.norm_added_k)
            query = torch.cat([query, context_query], dim=1)
            key = torch.cat([key, context_key], dim=1)
            value = torch.cat([value, context_value], dim=1)

        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        image, context = parts(out, tokens)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, context if attn.context_pre_only else attn.to_add_out(context)


def _normalised(query: Tensor, key: Tensor, norm_q: RMSNorm | None, norm_k: RMSNorm | None):
    if norm_q is None or norm_k is None:
        return query, key
    return ops.qk_norm_rope(query, key, norm_q.weight, norm_k.weight, eps=norm_q.eps)


def _joint_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    if block.use_dual_attention:
        yield from adaptive_sites(block, wanted, branch="attn.to_out")
    last = "attn2.to_out" if block.use_dual_attention else "attn.to_out"
    yield from adaptive_sites(block, wanted, branch=last, norm="norm2")
    yield from adaptive_sites(block, wanted, branch="ff")
    if not block.context_pre_only:
        yield from adaptive_sites(block, wanted, branch="attn.to_add_out", norm="norm2_context")
        yield from adaptive_sites(block, wanted, branch="ff_context")


def _single_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from adaptive_sites(block, wanted, branch="attn.to_out", norm="norm2")
    yield from adaptive_sites(block, wanted, branch="ff")


def _attention_sites(attention: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from qk_sites(attention, wanted, ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"))


REPLACEMENTS = (
    Replacement(FusedJointTransformerBlock, _joint_sites, {"forward": ("acf1bded0d47",)}),
    Replacement(FusedSD3SingleTransformerBlock, _single_sites, {"forward": ("a66127951039",)}),
    Replacement(FusedJointAttnProcessor, _attention_sites, {"__call__": ("51fe49da04d4",)}),
)

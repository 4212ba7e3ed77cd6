"""Qwen-Image: double blocks, rotary attention with complex tables per stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
)
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.patch.adaptive import clipped, gated, gated_modulated, modulated, parts
from dmdr_fast.patch.attention import attend
from dmdr_fast.patch.report import Left
from dmdr_fast.patch.rotations import RMSNorm, tables
from dmdr_fast.patch.structure import Replacement, Site, adaptive_sites, qk_sites, stands_in

MODELS = (QwenImageTransformer2DModel,)


@stands_in
class FusedQwenImageTransformerBlock(QwenImageTransformerBlock):
    fused_ops: frozenset[str]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        image = self._modulation(self.img_mod(temb), modulate_index)
        if self.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        text = self._modulation(self.txt_mod(temb), None)

        attended, text_attended = self.attn(
            hidden_states=modulated(self.fused_ops, self.img_norm1, hidden_states, *image[:2]),
            encoder_hidden_states=modulated(self.fused_ops, self.txt_norm1, encoder_hidden_states, *text[:2]),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = self._finish(hidden_states, attended, image[2:], self.img_norm2, self.img_mlp)
        encoder_hidden_states = self._finish(
            encoder_hidden_states, text_attended, text[2:], self.txt_norm2, self.txt_mlp
        )
        return encoder_hidden_states, hidden_states

    def _modulation(self, projected: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention and feed-forward: [B, 1, D], or [B, T, D] by ``index``.

        ``index`` [B, T] says which half of the projected batch each token takes (0: the first).
        """
        if index is None:
            return projected.unsqueeze(1).chunk(6, dim=-1)
        noisy, clean = projected.unsqueeze(1).chunk(2, dim=0)
        first = (index == 0).unsqueeze(-1)
        pairs = zip(noisy.chunk(6, dim=-1), clean.chunk(6, dim=-1), strict=True)
        return tuple(torch.where(first, a, b) for a, b in pairs)

    def _finish(self, stream: Tensor, attended: Tensor, modulation, norm: nn.LayerNorm, mlp: nn.Module) -> Tensor:
        """One stream from its attention on: gated residual, norm, feed-forward, gated residual."""
        gate, shift, scale, gate_mlp = modulation
        stream, x = gated_modulated(self.fused_ops, norm, stream, attended, gate, shift, scale)
        return clipped(gated(self.fused_ops, stream, mlp(x), gate_mlp))


@stands_in
class FusedQwenDoubleStreamAttnProcessor(QwenDoubleStreamAttnProcessor2_0):
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None or attention_mask is not None:
            raise ValueError(
                "Qwen-Image attention: expected encoder_hidden_states, and its mask as "
                "encoder_hidden_states_mask rather than attention_mask"
            )
        if encoder_hidden_states_mask is not None:
            image_mask = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            attention_mask = torch.cat([encoder_hidden_states_mask, image_mask], dim=1)[:, None, None, :]

        split = partial(torch.unflatten, dim=-1, sizes=(-1, attn.inner_dim // attn.heads))
        query, key, value = (split(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
        text_query, text_key, text_value = (
            split(project(encoder_hidden_states)) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        image_rotations, text_rotations = image_rotary_emb or (None, None)
        query, key = _rotated(query, key, attn.norm_q, attn.norm_k, image_rotations)
        text_query, text_key = _rotated(text_query, text_key, attn.norm_added_q, attn.norm_added_k, text_rotations)
        streams = ((text_query, query), (text_key, key), (text_value, value))
        query, key, value = (torch.cat(pair, dim=1) for pair in streams)

        out = attend(self, query, key, value, attention_mask)
        text, image = parts(out, encoder_hidden_states.shape[1])
        image = attn.to_out[0](image.contiguous())
        if len(attn.to_out) > 1:
            image = attn.to_out[1](image)
        return image, attn.to_add_out(text.contiguous())


def _rotated(
    query: Tensor, key: Tensor, norm_q: RMSNorm, norm_k: RMSNorm, rotations: Tensor | None
) -> tuple[Tensor, Tensor]:
    cos, sin = tables(rotations)
    return ops.qk_norm_rope(query, key, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps)


def _block_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    for stream, out in (("img", "attn.to_out"), ("txt", "attn.to_add_out")):
        yield from adaptive_sites(block, wanted, norm=f"{stream}_norm1")
        yield from adaptive_sites(block, wanted, branch=out, norm=f"{stream}_norm2")
        yield from adaptive_sites(block, wanted, branch=f"{stream}_mlp")


def _attention_sites(attention: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from qk_sites(attention, wanted, ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"))


REPLACEMENTS = (
    Replacement(
        FusedQwenImageTransformerBlock,
        _block_sites,
        {"forward": ("4445b1acdc09",), "_modulate": ("17f8f5f571fd",)},
    ),
    Replacement(
        FusedQwenDoubleStreamAttnProcessor,
        _attention_sites,
        {"__call__": ("717b093b7704", "d0d2cce03cf4", "b61abf485b97")},
    ),
)

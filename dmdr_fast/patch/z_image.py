"""Z-Image: one stream, RMS norms before and after each branch, a SwiGLU of two projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    FinalLayer,
    ZImageTransformer2DModel,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
    select_per_token,
)
from torch import Tensor, nn

from dmdr_fast import ops
from dmdr_fast.patch.adaptive import gated_normed, scaled
from dmdr_fast.patch.attention import attend
from dmdr_fast.patch.report import Left
from dmdr_fast.patch.rotations import tables
from dmdr_fast.patch.structure import (
    RMS_SCALE,
    SILU_MUL,
    Replacement,
    Site,
    adaptive_sites,
    qk_sites,
    sandwich_sites,
    stands_in,
)

MODELS = (ZImageTransformer2DModel,)
TWO_PROJECTIONS = (
    "w1 and w3 are two projections and the op reads one: the copy costs more than it saves where no gradient "
    "is taken; name silu_mul in ops= to have it"
)


@stands_in
class FusedZImageTransformerBlock(ZImageTransformerBlock):
    fused_ops: frozenset[str]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
    ) -> Tensor:
        modulation: Sequence[Tensor]
        if noise_mask is None:
            assert adaln_input is not None
            modulation = self._modulation(adaln_input)
        else:  # noisy and clean tokens in one sequence
            assert adaln_noisy is not None and adaln_clean is not None
            pairs = zip(self._modulation(adaln_noisy), self._modulation(adaln_clean), strict=True)
            tokens = x.shape[1]
            modulation = [select_per_token(noisy[:, 0], clean[:, 0], noise_mask, tokens) for noisy, clean in pairs]
        scale, gate, scale_ff, gate_ff = modulation
        h = scaled(self.fused_ops, self.attention_norm1, x, scale)
        h = self.attention(h, attention_mask=attn_mask, freqs_cis=freqs_cis)
        x = gated_normed(self.fused_ops, self.attention_norm2, x, h, gate)
        h = self.feed_forward(scaled(self.fused_ops, self.ffn_norm1, x, scale_ff))
        return gated_normed(self.fused_ops, self.ffn_norm2, x, h, gate_ff)

    def _modulation(self, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale and gate of the attention and of the feed-forward, each [B, 1, D]."""
        scale, gate, scale_ff, gate_ff = self.adaLN_modulation(embedding).unsqueeze(1).chunk(4, dim=2)
        return 1.0 + scale, gate.tanh(), 1.0 + scale_ff, gate_ff.tanh()


@stands_in
class FusedFinalLayer(FinalLayer):
    """Its modulation has no shift: a zero one adds nothing."""

    def forward(
        self,
        x: Tensor,
        c: Tensor | None = None,
        noise_mask: Tensor | None = None,
        c_noisy: Tensor | None = None,
        c_clean: Tensor | None = None,
    ) -> Tensor:
        if noise_mask is None:
            scale = self.adaLN_modulation(c)
        else:
            noisy, clean = self.adaLN_modulation(c_noisy), self.adaLN_modulation(c_clean)
            scale = select_per_token(noisy, clean, noise_mask, x.shape[1])
        shift = torch.zeros_like(scale)
        return self.linear(ops.layer_norm_modulate(x, shift, scale, eps=self.norm_final.eps))


@stands_in
class FusedFeedForward(FeedForward):
    """w2(silu(w1 x) w3 x) over the two projections side by side.

    Laying them side by side costs a copy: 7 tensors of w1 x's size read or written in the forward against
    5, though 5 in the backward against 9, and 2 kept for it against 3. A DMD update runs more forwards
    without gradient than with, and on a CPU forward and backward of the activation take 1.4 times as long
    (1 thread, 8192 x 680, float32 and bf16): so only on request.
    """

    def forward(self, x: Tensor) -> Tensor:
        packed = torch.cat([self.w3(x), self.w1(x)], dim=-1)
        return self.w2(ops.silu_mul(packed))


@stands_in
class FusedZSingleStreamAttnProcessor(ZSingleStreamAttnProcessor):
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = ops.qk_norm_rope(
            query, key, attn.norm_q.weight, attn.norm_k.weight, *tables(freqs_cis), eps=attn.norm_q.eps
        )
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        out = attend(self, query, key, value, attention_mask)
        out = attn.to_out[0](out)
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out


def _block_sites(block: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    if not block.modulation:
        if RMS_SCALE in wanted:
            yield Left(RMS_SCALE, "", "the text refiner has neither scales nor gates")
        return
    for branch in ("attention", "ffn"):
        yield from sandwich_sites(block, wanted, f"{branch}_norm1", f"{branch}_norm2")


def _final_sites(layer: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from adaptive_sites(layer, wanted, norm="norm_final")


def _feed_forward_sites(layer: nn.Module, wanted: frozenset[str]) -> Iterator[Site]:
    if SILU_MUL in wanted:
        yield Site(SILU_MUL, on_request=TWO_PROJECTIONS)


def _attention_sites(attention: nn.Module, wanted: frozenset[str]) -> Iterator[Site | Left]:
    yield from qk_sites(attention, wanted, ("norm_q", "norm_k"))


REPLACEMENTS = (
    Replacement(FusedZImageTransformerBlock, _block_sites, {"forward": ("7979cfb9a6a8",)}),
    Replacement(FusedFinalLayer, _final_sites, {"forward": ("d29653773e4a",)}),
    Replacement(
        FusedFeedForward,
        _feed_forward_sites,
        {"forward": ("cf046ca33c1c",), "_forward_silu_gating": ("bf5b0fd2a32f",)},
    ),
    Replacement(FusedZSingleStreamAttnProcessor, _attention_sites, {"__call__": ("7e6cdd6a00a5",)}),
)

"""Attention by diffusers' dispatcher, and FLUX's joint one: text and image as one sequence, each with its own norms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dmdr_fast.patch.rotations import rotated

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxAttention
    from diffusers.models.transformers.transformer_flux2 import Flux2Attention


class Processor(Protocol):
    """An attention processor whose kernel diffusers can switch."""

    _attention_backend: Any
    _parallel_config: Any


def joint(
    attn: FluxAttention | Flux2Attention, projections: Sequence[Tensor], rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(query, key, value [B, T, H, D] with the text first, tokens of the text) of an attention's projections."""
    split = partial(torch.unflatten, dim=-1, sizes=(-1, attn.head_dim))
    query, key, value = map(split, projections[:3])
    text_tokens = 0 if attn.added_kv_proj_dim is None else projections[3].shape[1]
    query, key = rotated(query, key, attn.norm_q, attn.norm_k, rotary, slice(text_tokens, None))
    if attn.added_kv_proj_dim is not None:
        text_query, text_key, text_value = map(split, projections[3:])
        text_query, text_key = rotated(
            text_query, text_key, attn.norm_added_q, attn.norm_added_k, rotary, slice(text_tokens)
        )
        query = torch.cat([text_query, query], dim=1)
        key = torch.cat([text_key, key], dim=1)
        value = torch.cat([text_value, value], dim=1)
    return query, key, value, text_tokens


def attend(processor: Processor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by the processor's own backend, [B, T, H D], in the query's dtype."""
    out = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return out.flatten(2, 3).to(query.dtype)

"""FLUX.1: packed latents, position ids, a guidance scale as an input (FLUX.1-dev)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmdr_fast.models.families.backbone import empty
from dmdr_fast.models.families.base import Condition, Family, token_counts
from dmdr_fast.models.families.packing import grid_ids, pack, unpack
from dmdr_fast.models.families.sd3 import decode_shifted

if TYPE_CHECKING:
    from diffusers import ModelMixin


class Flux(Family):
    """``FluxPipeline``: prompt_embeds [B, length, D] (T5), pooled_embeds [B, P] (CLIP).

    FLUX.1-dev learnt classifier-free guidance into an input of its own (``guidance``, 3.5 in its pipeline): as a
    teacher it needs no negative prompt.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    network = "FluxTransformer2DModel"
    block_names = ("transformer_blocks", "single_transformer_blocks")
    # proj_out of the single blocks is left out: its name is that of the last layer too
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    depth_keys = ("num_layers", "num_single_layers")
    default_length = 512
    default_guidance = 3.5

    @property
    def channels(self) -> int:
        return self.network_config["in_channels"] // 4

    def to_pipeline(self, x_t: Tensor) -> Tensor:
        return pack(x_t)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)

    def empty_condition(self, batch: int, dtype: torch.dtype) -> Condition:
        pooled = empty(batch, self.network_config["pooled_projection_dim"], dtype=dtype)
        return super().empty_condition(batch, dtype) | {"pooled_embeds": pooled}

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        text = condition["prompt_embeds"].to(x_t.dtype)
        prediction = network(
            hidden_states=self.to_pipeline(x_t),
            timestep=t,
            guidance=self.guidance_of(t),
            pooled_projections=condition["pooled_embeds"].to(x_t.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            img_ids=grid_ids(height // 2, width // 2, 3, x_t.device),
            return_dict=False,
        )[0]
        return self.from_pipeline(prediction, height, width)

    def fold_guidance(self, network: ModelMixin) -> ModelMixin:
        """The guidance's embedding is one vector, added to the time's: it goes into that one's bias."""
        if not self.network_config.get("guidance_embeds", False):
            return network
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        embed = network.time_text_embed
        with torch.no_grad():
            bias = embed.timestep_embedder.linear_2.bias
            scale = 1000.0 * torch.tensor([self.guidance], dtype=bias.dtype)  # rounded as in the network: 3504 in bf16
            vector = embed.guidance_embedder.float()(embed.time_proj(scale))[0]
            bias.copy_(bias.float() + vector)
        with torch.device("meta"):
            plain = CombinedTimestepTextProjEmbeddings(network.inner_dim, network.config.pooled_projection_dim)
        plain.timestep_embedder, plain.text_embedder = embed.timestep_embedder, embed.text_embedder
        network.time_text_embed = plain
        network.register_to_config(guidance_embeds=False)
        return network

    def decode(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        return decode_shifted(vae, latents)

    def read_encoded(self, encoded: Any, index: int) -> dict[str, Tensor]:
        return {"prompt_embeds": encoded[0][index], "pooled_embeds": encoded[1][index]}

    def count_tokens(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        """T5's; CLIP reads the first 77 of its own."""
        return token_counts(pipeline.tokenizer_2, prompts)

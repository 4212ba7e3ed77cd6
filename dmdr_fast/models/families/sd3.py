"""Stable Diffusion 3 and 3.5: MM-DiT on [B, 16, H, W], three text encoders, time times 1000."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmdr_fast.models.families.backbone import empty
from dmdr_fast.models.families.base import Condition, Family, token_counts

if TYPE_CHECKING:
    from diffusers import ModelMixin


class SD3(Family):
    """``StableDiffusion3Pipeline``: prompt_embeds [B, 77 + length, D] (CLIP twice, then T5), pooled_embeds [B, P]."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    network = "SD3Transformer2DModel"
    block_names = ("transformer_blocks",)
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    depth_keys = ("num_layers", "dual_attention_layers")
    default_length = 256
    passes_sigmas = False
    sized = True

    @property
    def patch(self) -> int:
        return self.network_config["patch_size"]

    @property
    def longest(self) -> int:
        """The middle of a table of positions is taken."""
        return self.network_config["pos_embed_max_size"]

    def with_depths(self, depths: tuple[int, ...]) -> dict[str, Any]:
        """Of all blocks, and of those with dual attention, the first ones."""
        return {**self.network_config, "num_layers": depths[0], "dual_attention_layers": list(range(depths[1]))}

    @property
    def few(self) -> tuple[int, ...]:
        layers, dual = self.depths
        return min(layers, min(dual, 2) + 3), min(dual, 2)

    def kind(self, name: str, block: nn.Module) -> str:
        """The last block leaves the text alone, the first ones may attend twice."""
        if getattr(block, "context_pre_only", False):
            return "last"
        return "dual" if getattr(block, "use_dual_attention", False) else super().kind(name, block)

    def empty_condition(self, batch: int, dtype: torch.dtype) -> Condition:
        text, pooled = self.network_config["joint_attention_dim"], self.network_config["pooled_projection_dim"]
        return {
            "prompt_embeds": empty(batch, self.length + 77, text, dtype=dtype),
            "pooled_embeds": empty(batch, pooled, dtype=dtype),
        }

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return network(
            hidden_states=x_t,
            timestep=1000.0 * t,
            encoder_hidden_states=condition["prompt_embeds"].to(x_t.dtype),
            pooled_projections=condition["pooled_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]

    def decode(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        return decode_shifted(vae, latents)

    def encode_arguments(self) -> dict[str, Any]:
        separate = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
        return separate | super().encode_arguments()

    def read_encoded(self, encoded: Any, index: int) -> dict[str, Tensor]:
        return {"prompt_embeds": encoded[0][index], "pooled_embeds": encoded[2][index]}

    def count_tokens(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        """T5's; CLIP reads the first 77 of its own."""
        return token_counts(pipeline.tokenizer_3, prompts)


def decode_shifted(vae: ModelMixin, latents: Tensor) -> Tensor:
    """D(z / scaling_factor + shift_factor): AutoencoderKL in SD3, FLUX.1 and Z-Image."""
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z.to(vae.dtype), return_dict=False)[0]

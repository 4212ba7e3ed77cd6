"""FLUX.2: latents already in 2 x 2 patches, whitened by the VAE's batch-norm statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmdr_fast.models.families.base import Condition, Family, token_counts
from dmdr_fast.models.families.packing import grid_ids, unpatchify

if TYPE_CHECKING:
    from diffusers import ModelMixin


class Flux2(Family):
    """``Flux2Pipeline`` and ``Flux2KleinPipeline``: prompt_embeds [B, length, D], three layers of a language model.

    x_t is [B, 4 c, H/2, W/2] for a VAE of c channels: the pipeline draws its noise and whitens there.
    """

    name = "flux2"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    network = "Flux2Transformer2DModel"
    vae = "AutoencoderKLFlux2"
    block_names = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "attn.to_out"),
    )
    depth_keys = ("num_layers", "num_single_layers")
    default_length = 512
    default_guidance = 4.0

    @property
    def factor(self) -> int:
        return 2 * super().factor

    @property
    def patch(self) -> int:
        return 1

    def default_shift(self, height: int, width: int) -> float:
        """exp(mu) of the pipeline's fit in image tokens, at its default of 50 steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return math.exp(compute_empirical_mu(self.tokens(height, width), 50))

    def to_pipeline(self, x_t: Tensor) -> Tensor:
        return x_t.flatten(2).transpose(1, 2)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (height, width))

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        text = condition["prompt_embeds"].to(x_t.dtype)
        text_ids = torch.zeros(text.shape[1], 4, device=x_t.device)
        text_ids[:, 3] += torch.arange(text.shape[1], device=x_t.device)
        prediction = network(
            hidden_states=self.to_pipeline(x_t),
            timestep=t,
            guidance=self.guidance_of(t),
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=grid_ids(height, width, 4, x_t.device),
            return_dict=False,
        )[0]
        return self.from_pipeline(prediction, height, width)

    def fold_guidance(self, network: ModelMixin) -> ModelMixin:
        """W1 of the guidance's embedding changes by one rank, so that p(0) is mapped to where p(guidance) was.

        No layer there has a bias to take a constant. p is the sinusoidal projection, and |p(0)|^2 half its length.
        """
        if not self.network_config.get("guidance_embeds", False):
            return network
        embed = network.time_guidance_embed
        with torch.no_grad():
            weight = embed.guidance_embedder.linear_1.weight
            none, now = embed.time_proj(1000.0 * torch.tensor([0.0, self.guidance], dtype=weight.dtype))
            change = torch.outer(weight.float() @ (now - none), none / none.square().sum())
            weight.copy_(weight.float() + change)
        return network

    def decode(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.dtype)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents.dtype)
        return vae.decode(unpatchify(latents * std + mean).to(vae.dtype), return_dict=False)[0]

    def read_encoded(self, encoded: Any, index: int) -> dict[str, Tensor]:
        return {"prompt_embeds": encoded[0][index]}

    def count_tokens(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        return [_chat_tokens(pipeline, prompt) for prompt in prompts]


def _chat_tokens(pipeline: Any, prompt: str) -> int:
    """Tokens of the prompt in its chat template: FLUX.2-dev's with a system message, FLUX.2-klein's without."""
    if not hasattr(pipeline, "system_message"):
        chat = [{"role": "user", "content": prompt}]
        text = pipeline.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return token_counts(pipeline.tokenizer, [text])[0]
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    chats = format_input([prompt], system_message=pipeline.system_message)
    return len(pipeline.tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"][0])

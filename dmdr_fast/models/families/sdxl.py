"""SDXL: a U-Net that predicts eps on the variance-preserving path of 1,000 steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmdr_fast.models.families.backbone import empty
from dmdr_fast.models.families.base import Condition, Family, token_counts

if TYPE_CHECKING:
    from diffusers import ModelMixin


class SDXL(Family):
    """``StableDiffusionXLPipeline``: prompt_embeds [B, 77, D], pooled_embeds [B, P] (two CLIP encoders).

    t in [0, 1] is step ceil(1000 t) - 1 of the DDPM, so t = 1 is step 999; x_t = sqrt(abar) x0 + sqrt(1 - abar) eps.
    Size and crop embeddings are those of an uncropped image of x_t's size.
    """

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    network = "UNet2DConditionModel"
    folder = "unet"
    prediction = "eps"
    block_names = (
        *("*_blocks.*.resnets", "*_blocks.*.attentions.*.transformer_blocks"),
        *("mid_block.resnets", "mid_block.attentions.*.transformer_blocks"),
    )
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    depth_keys = ("transformer_layers_per_block",)
    text_width = "cross_attention_dim"
    fused = False
    default_length = 77
    sized = True

    @property
    def patch(self) -> int:
        """Latent pixels must halve evenly down to the coarsest level."""
        return 2 ** (len(self.network_config["block_out_channels"]) - 1)

    @property
    def depths(self) -> tuple[int, ...]:
        """Of each level of the U-Net."""
        return tuple(self.network_config.get("transformer_layers_per_block") or ())

    def with_depths(self, depths: tuple[int, ...]) -> dict[str, Any]:
        return {**self.network_config, "transformer_layers_per_block": list(depths)}

    def empty_condition(self, batch: int, dtype: torch.dtype) -> Condition:
        config = self.network_config
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return super().empty_condition(batch, dtype) | {"pooled_embeds": empty(batch, pooled, dtype=dtype)}

    def steps(self, t: Tensor) -> Tensor:
        """The DDPM step of each t: int64 [B] in 0..999."""
        # a thousandth of a step below: 1000 t of fp32 may lie one rounding above its whole number
        return (1000.0 * t - 1e-3).ceil().long().sub(1).clamp(0, 999)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar), sqrt(1 - abar) of the step, fp32 [B]."""
        abar = _alpha_bars(self._noise(), t.device)[self.steps(t)]
        return abar.sqrt(), (1.0 - abar).sqrt()

    def _noise(self) -> tuple[str, float, float, bool]:
        config = self.scheduler_config
        return (
            config.get("beta_schedule", "scaled_linear"),
            config.get("beta_start", 0.00085),
            config.get("beta_end", 0.012),
            config.get("rescale_betas_zero_snr", False),
        )

    def default_shift(self, height: int, width: int) -> float:
        """1: the path has no shift."""
        return 1.0

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        batch, _, height, width = x_t.shape
        sizes = x_t.new_zeros(batch, 6)  # original height and width, crop top and left, target height and width
        sizes[:, 0::4] = self.factor * height
        sizes[:, 1::4] = self.factor * width
        return network(
            x_t,
            self.steps(t),
            encoder_hidden_states=condition["prompt_embeds"].to(x_t.dtype),
            added_cond_kwargs={"text_embeds": condition["pooled_embeds"].to(x_t.dtype), "time_ids": sizes},
            return_dict=False,
        )[0]

    def decode(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        z = latents / vae.config.scaling_factor
        if mean is not None and std is not None:
            mean, std = (torch.tensor(v, dtype=z.dtype, device=z.device).view(1, -1, 1, 1) for v in (mean, std))
            z = z * std + mean
        return vae.decode(z.to(vae.dtype), return_dict=False)[0]

    def read_encoded(self, encoded: Any, index: int) -> dict[str, Tensor]:
        return {"prompt_embeds": encoded[0][index], "pooled_embeds": encoded[2][index]}

    def encode_arguments(self) -> dict[str, Any]:
        return {"do_classifier_free_guidance": False}

    def count_tokens(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        return token_counts(pipeline.tokenizer_2, prompts)


@cache
def _alpha_bars(noise: tuple[str, float, float, bool], device: torch.device) -> Tensor:
    """abar of the 1,000 steps, fp32, as diffusers' schedulers compute it; one copy per device."""
    from diffusers import DDPMScheduler

    schedule, start, end, zero_snr = noise
    scheduler = DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end, rescale_betas_zero_snr=zero_snr)
    return scheduler.alphas_cumprod.to(device)

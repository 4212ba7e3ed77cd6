"""Qwen-Image: packed latents, text of its own length under a mask, a video VAE with one frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dmdr_fast.models.families.backbone import empty
from dmdr_fast.models.families.base import Condition, Family, pad_rows, token_counts
from dmdr_fast.models.families.packing import pack, unpack

if TYPE_CHECKING:
    from diffusers import ModelMixin


class QwenImage(Family):
    """``QwenImagePipeline``: prompt_embeds [B, length, D], mask bool [B, length] (true: a token of the prompt).

    The encoders' batch is one prompt: their tokenizer pads to the longest prompt of a batch, and the last bits of an
    embedding would depend on its company.
    """

    name = "qwen_image"
    pipelines = ("QwenImagePipeline",)
    network = "QwenImageTransformer2DModel"
    vae = "AutoencoderKLQwenImage"
    block_names = ("transformer_blocks",)
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    depth_keys = ("num_layers",)
    default_length = 512
    encode_batch = 1
    unguided: ClassVar[Mapping[str, float]] = {"true_cfg_scale": 1}

    @property
    def channels(self) -> int:
        return self.network_config["in_channels"] // 4

    @property
    def factor(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])

    def to_pipeline(self, x_t: Tensor) -> Tensor:
        return pack(x_t)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)

    def empty_condition(self, batch: int, dtype: torch.dtype) -> Condition:
        return super().empty_condition(batch, dtype) | {"mask": empty(batch, self.length, dtype=torch.bool)}

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        batch, _, height, width = x_t.shape
        prediction = network(
            hidden_states=self.to_pipeline(x_t),
            timestep=t,
            encoder_hidden_states=condition["prompt_embeds"].to(x_t.dtype),
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return self.from_pipeline(prediction, height, width)

    def decode(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, dtype=latents.dtype).view(1, -1, 1, 1).to(latents.device, non_blocking=True)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode((latents * std + mean).unsqueeze(2).to(vae.dtype), return_dict=False)[0][:, :, 0]

    def condition(self, entries: Sequence[Mapping[str, Tensor]], length: int | None = None) -> Condition:
        length = length or self.length
        rows = [entry["prompt_embeds"] for entry in entries]
        lengths = torch.tensor([row.shape[0] for row in rows])
        return {"prompt_embeds": pad_rows(rows, length, self.name), "mask": torch.arange(length) < lengths[:, None]}

    def read_encoded(self, encoded: Any, index: int) -> dict[str, Tensor]:
        embeds, mask = encoded[0][index], encoded[1]
        return {"prompt_embeds": embeds if mask is None else embeds[mask[index].bool()]}

    def count_tokens(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        """Those behind the template's fixed start, which the pipeline cuts off."""
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        return [n - pipeline.prompt_template_encode_start_idx for n in token_counts(pipeline.tokenizer, texts)]

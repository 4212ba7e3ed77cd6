"""SiT to the planner: labels in, latents of one square size or pixels out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_fast.models.families.backbone import Backbone, empty
from dmdr_fast.models.sit import SiT


@dataclass(frozen=True)
class SiTBackbone(Backbone):
    """A SiT of one configuration, with the AutoencoderKL of Stable Diffusion or, without a VAE, in pixels."""

    name = "sit"
    lora_targets = ("attn.qkv",)
    depth_keys = ("depth",)
    takes_prompts = False
    merges_lora = True

    path: str
    network_config: Mapping[str, Any]
    vae_config: Mapping[str, Any] | None

    @classmethod
    def of(cls, name: str, network_config: Mapping[str, Any], vae_config: Any, length: int) -> SiTBackbone:
        return cls(name, network_config, vae_config)

    @classmethod
    def build_from_config(cls, config: Mapping[str, Any]) -> SiT:
        return SiT(**{k: v for k, v in config.items() if not k.startswith("_")})

    def blocks(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield from ((f"blocks.{i}", block) for i, block in enumerate(network.get_submodule("blocks").children()))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = 1 if self.vae_config is None else 8
        side = self.network_config["input_size"]
        if (height, width) != (side * factor, side * factor):
            raise ValueError(f"{self.path} makes images of {side * factor} pixels, got {height} x {width}")
        return self.network_config["in_channels"], side, side

    def empty_condition(self, batch: int, dtype: torch.dtype) -> Tensor:
        return empty(batch, dtype=torch.int64)

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return network(x_t, t, condition)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return latents if vae is None else vae.decode(latents.to(vae.dtype)).sample

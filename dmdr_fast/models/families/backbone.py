"""The network of a family as the planner sees it: how deep it is, what goes in, what comes out; no weights.

Its methods run on the meta device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Backbone(ABC):
    """A family's network of one configuration, and its VAE's."""

    name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]  # suffixes for ``add_lora``: attention and feed-forward of every block
    depth_keys: ClassVar[tuple[str, ...]]  # of its configuration, one for each kind of block: how many there are
    takes_prompts: ClassVar[bool] = True  # its conditions are text embeddings, not labels
    merges_lora: ClassVar[bool] = False  # a generator's adapter is saved as part of the weights
    fused: ClassVar[bool] = True  # ``dmdr_fast.patch`` knows its layers

    network_config: Mapping[str, Any]

    @classmethod
    @abstractmethod
    def of(cls, name: str, network_config: Mapping[str, Any], vae_config: Any, length: int) -> Backbone:
        """The family's network of configurations alone."""

    @classmethod
    @abstractmethod
    def build_from_config(cls, config: Mapping[str, Any]) -> nn.Module:
        """The untrained network of a config; inside ``with torch.device("meta")`` it takes no memory."""

    @property
    def depths(self) -> tuple[int, ...]:
        """How many blocks of each kind there are."""
        found = (self.network_config.get(key) or () for key in self.depth_keys)
        return tuple(n if isinstance(n, int) else len(n) for n in found)

    def with_depths(self, depths: tuple[int, ...]) -> dict[str, Any]:
        """The configuration with other numbers of blocks."""
        return {**self.network_config, **dict(zip(self.depth_keys, depths, strict=True))}

    @property
    def few(self) -> tuple[int, ...]:
        """Depths with every kind of block that the network has, twice."""
        return tuple(min(depth, 2) for depth in self.depths)

    @abstractmethod
    def blocks(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(name, block) of every repeated block: the units of activation checkpointing, in the model's order."""

    def kind(self, name: str, block: nn.Module) -> str:
        """Equal for blocks with the same modules."""
        return name.rpartition(".")[0]

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of x_t for an image of ``height`` x ``width`` pixels; ValueError where there is none."""

    @abstractmethod
    def empty_condition(self, batch: int, dtype: torch.dtype) -> Any:
        """A condition of the longest prompts, or of labels, without values."""

    @abstractmethod
    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The network's prediction at (x_t, t)."""

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Images [B, 3, height, width] in about [-1, 1], in the VAE's dtype, of x0; differentiable."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without storage."""
    return torch.empty(*shape, dtype=dtype, device="meta")

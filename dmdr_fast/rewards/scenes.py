"""Rewards of scenes: how well an image shows the two coloured digits that its prompt asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmdr_fast.rewards.base import check_prompts
from dmdr_fast.scenes.captions import parse
from dmdr_fast.scenes.verifier import Kind, load_verifier


class ScenesReward(nn.Module):
    """r(image, prompt) = log p(attributes of the prompt | image) of the convolutional verifier; differentiable.

    The verifier is stored with the package, frozen: see :mod:`dmdr_fast.scenes.verifier`.
    """

    name = "scenes"
    differentiable = True
    kind: Kind = "verifier"

    def __init__(self) -> None:
        super().__init__()
        self.verifier = load_verifier(self.kind)

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 3, 16, 16] in [-1, 1] (any float dtype) and B captions of scenes.

        Raises:
            ValueError: images of another shape, not one prompt each, or a prompt that describes no scene.
        """
        return self.verifier.log_probability(images, prompted(prompts, images, self.name))


class ScenesHeldOutReward(ScenesReward):
    """The same of the held-out verifier, which shares neither architecture nor seed nor scans with the other."""

    name = "scenes_held_out"
    kind = "held_out_verifier"


class ScenesRightReward(ScenesReward):
    """r(image, prompt) = the share of the prompt's five attributes that the convolutional verifier reads, 0 to 1.

    Score-only: it says what is right and has no gradient.
    """

    name = "scenes_right"
    differentiable = False

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B]; arguments and errors as of :class:`ScenesReward`."""
        return (self.verifier.read(images) == prompted(prompts, images, self.name)).float().mean(1)


def prompted(prompts: list[str] | None, images: Tensor, name: str) -> Tensor:
    """The attributes int64 [B, 5] that the prompts ask for, on the images' device; errors name the reward.

    Raises:
        ValueError: not one prompt per image, or one that describes no scene.
    """
    asked = check_prompts(prompts, images, name)
    try:
        return torch.tensor([parse(prompt) for prompt in asked], device=images.device)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from None

"""LAION's aesthetic predictor: how an image is liked, whatever it shows."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast.rewards.clip import clip_configuration
from dmdr_fast.rewards.linear_head import linear_head
from dmdr_fast.rewards.loading import FrozenReward, load_pretrained, load_state
from dmdr_fast.rewards.pixels import square_pixels


class AestheticReward(FrozenReward):
    """r(image) = head(E_image / |E_image|) of CLIP ViT-L/14's projected image embedding, on a scale of 1 to 10.

    Args:
        path: the head ("sac+logos+ava1-l14-linearMSE.pth"), or a folder or hub id that has ``file``.
        file: its name there.
        clip: folder or hub id of the CLIP, whose image half ``transformers`` loads.
        dtype: of the frozen CLIP and its forward; the head is fp32.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to change.

    Source: christophschuhmann/improved-aesthetic-predictor; the default is the copy that TRL's DDPO example uses.
    """

    def __init__(
        self,
        path: str | Path = "trl-lib/ddpo-aesthetic-predictor",
        *,
        file: str = "aesthetic-model.pth",
        clip: str | Path = "openai/clip-vit-large-patch14",
        dtype: torch.dtype = torch.float32,
        name: str = "aesthetic",
    ) -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        self.name, where = name, f"reward {name!r}"
        state = load_state(path, file, where=where)
        both = clip_configuration(clip, where=where)
        both.vision_config.projection_dim = both.projection_dim  # which configurations do not always say twice
        self.clip = load_pretrained(
            CLIPVisionModelWithProjection, clip, dtype=dtype, where=where, key="options.clip", config=both.vision_config
        )
        self.head = linear_head(state, "", self.clip.config.projection_dim, where=where)

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 3, H, W] in [-1, 1]; nothing else is read."""
        pixels = square_pixels(images, self.clip.config.image_size).to(self.clip.dtype)
        embeddings = self.clip(pixel_values=pixels).image_embeds
        return self.head(F.normalize(embeddings.float(), dim=1)).squeeze(1)

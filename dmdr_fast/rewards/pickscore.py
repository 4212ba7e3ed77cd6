"""PickScore: a CLIP fitted to which of two images people picked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmdr_fast.rewards.clip import load_clip
from dmdr_fast.rewards.loading import FrozenReward


class PickScoreReward(FrozenReward):
    """r(image, prompt) = exp(logit_scale) cos(E_image, E_prompt), about 20; one point is odds of e to 1.

    Args:
        path: folder or hub id that ``transformers.CLIPModel`` loads.
        tokenizer: folder or hub id of its tokenizer; PickScore's is that of the CLIP ViT-H it started from.
        dtype: of the frozen weights and the forward; the cosine is fp32.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to change.

    Source: Pick-a-Pic (arXiv 2305.01569).
    """

    def __init__(
        self,
        path: str | Path = "yuvalkirstain/PickScore_v1",
        *,
        tokenizer: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: torch.dtype = torch.float32,
        name: str = "pickscore",
    ) -> None:
        super().__init__()
        self.name = name
        self.clip = load_clip(path, tokenizer, dtype=dtype, where=f"reward {name!r}")

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 3, H, W] in [-1, 1] and B prompts (``labels`` are not read)."""
        return self.clip.model.logit_scale.float().exp() * self.clip.cosines(images, prompts, self.name)

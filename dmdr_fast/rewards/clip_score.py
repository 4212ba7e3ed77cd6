"""CLIP score: how well an image fits its prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmdr_fast.rewards.clip import load_clip
from dmdr_fast.rewards.loading import FrozenReward


class CLIPScoreReward(FrozenReward):
    """r(image, prompt) = 100 cos(E_image, E_prompt) of a CLIP; not clamped at 0, where the gradient would end.

    Args:
        path: folder or hub id that ``transformers.CLIPModel`` loads.
        tokenizer: folder or hub id of its tokenizer; None: in ``path``.
        dtype: of the frozen weights and the forward; the cosine is fp32.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to change.

    Source: CLIPScore (arXiv 2104.08718), with torchmetrics' factor.
    """

    def __init__(
        self,
        path: str | Path = "openai/clip-vit-large-patch14",
        *,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        name: str = "clip_score",
    ) -> None:
        super().__init__()
        self.name = name
        self.clip = load_clip(path, tokenizer, dtype=dtype, where=f"reward {name!r}")

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 3, H, W] in [-1, 1] and B prompts (``labels`` are not read)."""
        return 100 * self.clip.cosines(images, prompts, self.name)

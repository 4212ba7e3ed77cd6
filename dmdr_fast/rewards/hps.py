"""HPSv2: a CLIP ViT-H fitted to human preferences, published with open_clip's weight names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmdr_fast.rewards.clip import clip_configuration, load_clip
from dmdr_fast.rewards.loading import PUBLISHED, FrozenReward, load_state
from dmdr_fast.rewards.open_clip_keys import from_open_clip


class HPSReward(FrozenReward):
    """r(image, prompt) = cos(E_image, E_prompt), 0.2 to 0.4 for photographs and paintings.

    Images that are no squares are padded with black, as HPSv2's own evaluation does.

    Args:
        path: the checkpoint with open_clip's names, or a folder or hub id that has ``file``.
        file: which one there; "HPS_v2_compressed.pt" is version 2.0's.
        clip: folder or hub id of the CLIP it started from, in transformers' format: its configuration and
            tokenizer are read, its weights are not.
        dtype: of the frozen weights and the forward; the cosine is fp32.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to change.

    Source: HPSv2 (arXiv 2306.09341).
    """

    def __init__(
        self,
        path: str | Path = "xswu/HPSv2",
        *,
        file: str = "HPS_v2.1_compressed.pt",
        clip: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: torch.dtype = torch.float32,
        name: str = "hps",
    ) -> None:
        super().__init__()
        self.name, where = name, f"reward {name!r}"
        weights = from_open_clip(load_state(path, file, where=where), where=where)
        given = {"state_dict": weights, "config": clip_configuration(clip, where=where)}
        self.clip = load_clip(clip, clip, dtype=dtype, where=where, fit="pad", expected=PUBLISHED, **given)

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 3, H, W] in [-1, 1] and B prompts (``labels`` are not read)."""
        return self.clip.cosines(images, prompts, self.name)

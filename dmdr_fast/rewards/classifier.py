"""The classifier reward: log p(label | image) of an image classifier from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmdr_fast import ops
from dmdr_fast.rewards.loading import FrozenReward, load_pretrained

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXPECTED = (
    "a folder or reachable hub id of an image classifier with its head, such as "
    "facebook/dinov2-large-imagenet1k-1-layer"
)


class TransformersClassifierReward(FrozenReward):
    """r(image, label) = log softmax(logits(image))[label], which is minus the cross entropy; differentiable.

    DMDR's ImageNet reward is this with DINOv2-L and a linear head; its weights come from torch.hub
    (``dinov2_vitl14_lc``, by default the head over four layers). transformers' export of the same backbone,
    "facebook/dinov2-large-imagenet1k-1-layer", has the one-layer head.

    Args:
        path: folder or hub id of a model that ``AutoModelForImageClassification`` loads.
        size: side in pixels to which images are resized (antialiased bicubic), a multiple of the patch size.
        mean, std: per channel, of images in [0, 1].
        dtype: of the frozen weights and the forward; the log-softmax is fp32.
        num_classes: of the model to be trained; an error where the classifier's differ. None: not compared.

    Raises:
        FileNotFoundError: nothing that loads at ``path``.
        ValueError: no image classifier, another number of classes, or weights without the head.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
        num_classes: int | None = None,
        name: str = "classifier",
    ):
        super().__init__()
        self.name, self.size, self.mean, self.std = name, size, tuple(mean), tuple(std)
        from transformers import AutoModelForImageClassification  # seconds to import, and optional

        self.classifier = load_pretrained(
            AutoModelForImageClassification, path, dtype=dtype, where=f"reward {name!r}", expected=EXPECTED
        )
        self.num_classes: int = self.classifier.config.num_labels
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"reward {name!r}: expected a classifier of {num_classes} classes, got {self.num_classes} in {path}: "
                "set path of its reward.terms entry to a classifier of the model's classes, or model.num_classes to "
                f"{self.num_classes}"
            )

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 3, H, W] in [-1, 1] (clamped) and labels int64 [B]; prompts unused.

        Raises:
            ValueError: no labels, or not one class per image.
        """
        if labels is None or labels.shape != images.shape[:1] or labels.is_floating_point():
            got = "None" if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"reward {self.name!r}: labels must be int64 [{len(images)}], one per image, got {got}")
        pixels = ops.preprocess_reward(images, self.size, self.mean, self.std)
        logits = self.classifier(pixels.to(self.classifier.dtype)).logits
        return logits.float().log_softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)

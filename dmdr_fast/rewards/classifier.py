"""The classifier reward: log p(label | image) of an image classifier from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dmdr_fast import ops

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TransformersClassifierReward(nn.Module):
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

    differentiable = True

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
        self.classifier = _load(path, dtype).requires_grad_(False).eval()
        self.num_classes: int = self.classifier.config.num_labels
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"reward {name!r}: expected a classifier of {num_classes} classes, got {self.num_classes} in "
                f"{path}: set reward.path to a classifier of the model's classes, or model.num_classes to "
                f"{self.num_classes}"
            )

    def train(self, mode: bool = True) -> TransformersClassifierReward:
        """The classifier stays in evaluation mode (no dropout), whatever is around it."""
        return super().train(False)

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


def _load(path: str | Path, dtype: torch.dtype) -> nn.Module:
    remedy = "set reward.path to a folder with config.json and weights, or a hub id that can be reached"
    if not Path(path).exists() and (str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1):
        raise FileNotFoundError(f"classifier reward: no folder {path}: {remedy}")
    from transformers import AutoModelForImageClassification  # seconds to import, and optional

    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            str(path), dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"classifier reward: cannot load {path} ({reason}): {remedy}") from error
    if report["missing_keys"]:  # transformers fills them with random values and goes on
        raise ValueError(
            f"classifier reward: {path} lacks {sorted(report['missing_keys'])[0]}: expected a trained "
            "classifier, got a backbone without its head: set reward.path to one with the head, such as "
            "facebook/dinov2-large-imagenet1k-1-layer"
        )
    return model

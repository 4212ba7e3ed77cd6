"""The digits reward: how sure a small CNN is that an image shows the digit it was asked for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.data.classifier import digits_classifier
from dmdr_fast.data.digits import NUM_CLASSES

SEED = 1_234
STEPS = 500
# Smooths log p around the data, so that its gradient leads somewhere from the blurred images of a cold start.
NOISE = 0.3


def digits_cnn() -> nn.Module:
    """Three 3x3 convolutions over 8x8 -> 4x4 and a linear layer: [B, 1, 8, 8] to logits [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, NUM_CLASSES),
    )


class DigitsReward(nn.Module):
    """r(image, label) = log p(label | image) of a CNN fitted on the digits; differentiable in the image.

    The CNN is frozen, fitted on first use (seconds, on one core) and cached; label smoothing and noise keep
    it from being certain. Of the real digits half score above -0.013, and their mean is -0.04; of Gaussian
    noise it is -5.6.

    Attributes:
        name: ``"digits"``.
        differentiable: True, so ReFL can use it.
        test_accuracy: of the CNN on the digits it was not fitted on, 0..1.
    """

    name = "digits"
    differentiable = True

    def __init__(self, *, cache: Path | None = None) -> None:
        super().__init__()
        self.classifier, self.test_accuracy = digits_classifier(
            "digits-reward", digits_cnn, seed=SEED, steps=STEPS, noise=NOISE, root=cache
        )

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 1, 8, 8] in [-1, 1] (any float dtype) and labels int64 [B] in 0..9.

        Raises:
            ValueError: images of another shape, or not one label each (``prompts`` are not read).
        """
        return label_log_probability(self.classifier, images, labels)


def label_log_probability(classifier: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """log softmax(classifier(image))[label], fp32 [B], of images [B, 1, 8, 8] and labels int64 [B].

    Raises:
        ValueError: images of another shape, or not one label each.
    """
    if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
        raise ValueError(f"images: expected [B, 1, 8, 8], got {list(images.shape)}")
    if labels is None or labels.shape != images.shape[:1]:
        got = "None" if labels is None else str(list(labels.shape))
        raise ValueError(f"labels: expected one class per image, [{len(images)}], got {got}")
    return -F.cross_entropy(classifier(images.float()), labels, reduction="none")

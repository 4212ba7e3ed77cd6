"""The held-out digits reward: a second opinion that no generator is trained on, to see reward hacking by."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dmdr_fast.data.classifier import digits_classifier
from dmdr_fast.data.digits import NUM_CLASSES
from dmdr_fast.rewards.digits import NOISE, label_log_probability

SEED = 555_001
STEPS = 500


class RowsAndColumnsGRU(nn.Module):
    """Two bidirectional GRUs read the rows and the columns of [B, 1, 8, 8]; their mean states give logits [B, 10]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rows = nn.GRU(8, width, batch_first=True, bidirectional=True)
        self.columns = nn.GRU(8, width, batch_first=True, bidirectional=True)
        self.classify = nn.Linear(4 * width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images[:, 0]
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's has no backward in evaluation mode
            states = [self.rows(pixels)[0], self.columns(pixels.mT)[0]]
        return self.classify(torch.cat([s.mean(1) for s in states], dim=1))


class DigitsHeldOutReward(nn.Module):
    """r(image, label) = log p(label | image) of a classifier that shares nothing with the optimised reward's.

    Recurrent where :class:`~dmdr_fast.rewards.digits.DigitsReward` is convolutional and the evaluation's features
    are a residual MLP; its own seed; and fitted on the 364 digits that neither of them is fitted on. Where a
    generator finds what only the optimised classifier likes, this one does not follow. Fitted on first use (seconds,
    on one core) and cached.

    Attributes:
        name: ``"digits_held_out"``.
        differentiable: True.
        test_accuracy: of the classifier on the other 1,433 digits, 0..1; 0.98.
    """

    name = "digits_held_out"
    differentiable = True

    def __init__(self, *, cache: Path | None = None) -> None:
        super().__init__()
        self.classifier, self.test_accuracy = digits_classifier(
            "digits-held-out",
            RowsAndColumnsGRU,
            seed=SEED,
            steps=STEPS,
            noise=NOISE,
            on_held_out=True,
            root=cache,
        )

    def forward(self, images: Tensor, *, labels: Tensor | None = None, prompts: list[str] | None = None) -> Tensor:
        """Rewards fp32 [B] of images [B, 1, 8, 8] in [-1, 1] (any float dtype) and labels int64 [B] in 0..9.

        Raises:
            ValueError: images of another shape, or not one label each (``prompts`` are not read).
        """
        return label_log_probability(self.classifier, images, labels)

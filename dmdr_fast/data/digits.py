"""scikit-learn's digits: 1,797 scans of handwritten digits, 8x8 pixels, 17 grey levels."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CLASSES = 10
HELD_OUT_EVERY = 5


def load_digits() -> tuple[Tensor, Tensor]:
    """All images, float32 [1797, 1, 8, 8] in [-1, 1] (-1 is background), and labels, int64 [1797] in 0..9.

    Shipped with scikit-learn. Pixel p of 0..16 becomes p / 8 - 1, exactly.
    Source: the test part of the UCI set "Optical Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits as load

    data = load()
    images = torch.from_numpy(data.images).to(torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(data.target).to(torch.int64)


def held_out(labels: Tensor) -> Tensor:
    """Bool [N]: every fifth sample of each class in ``labels`` [N], on which no classifier is fitted."""
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        held[(labels == label).nonzero()[::HELD_OUT_EVERY]] = True
    return held

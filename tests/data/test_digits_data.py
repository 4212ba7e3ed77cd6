"""The digits come as scikit-learn has them, scaled exactly."""

import torch
from sklearn.datasets import load_digits as sklearn_digits

from dmdr_fast.data.digits import held_out, load_digits


def test_images_are_sklearns_scaled_to_minus_one_and_one():
    images, labels = load_digits()
    raw = sklearn_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32 and images.is_contiguous()
    assert images.min() == -1 and images.max() == 1
    assert torch.equal((images.double().squeeze(1) + 1) * 8, torch.from_numpy(raw.images))
    assert labels.dtype == torch.int64 and labels.tolist() == raw.target.tolist()


def test_a_fifth_of_every_class_is_held_out():
    _, labels = load_digits()
    held = held_out(labels)
    counts = labels.bincount()
    assert torch.equal(labels[held].bincount(), (counts + 4) // 5)
    assert held_out(torch.tensor([3, 3, 1, 3, 3, 3, 1, 3])).tolist() == [
        True,
        False,
        True,
        *[False] * 4,
        True,
    ]

"""Class labels for a training step as a pure function of (seed, step, global sample index)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def class_labels(seed: int, step: int, index_range: tuple[int, int], num_classes: int) -> Tensor:
    """Uniform class labels of samples [start, stop) of one step's global batch: int64, on the CPU.

    label_i = floor(num_classes * u_i / 2^32), u_i the high half of the i-th 64-bit word of Philox4x64 keyed
    by (seed, step). A sample's label depends neither on the number of ranks nor on what was drawn before, so
    a resumed run, or one on another number of ranks, sees the same labels. The raw words are used because
    numpy promises to keep a bit generator's stream, not what its distributions make of it. No class is more
    likely than another by over num_classes / 2^32.

    Raises:
        ValueError: a negative seed, step or start, start > stop, or ``num_classes`` not in 1..2^31.
    """
    start, stop = index_range
    for name, value in (("seed", seed), ("step", step), ("index_range's start", start)):
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    if stop < start:
        raise ValueError(f"index_range: expected start <= stop, got ({start}, {stop})")
    if not 1 <= num_classes <= 2**31:
        raise ValueError(f"num_classes: expected 1 to 2^31, got {num_classes}")
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(stop)[start:]
    return torch.from_numpy((((words >> 32) * num_classes) >> 32).astype(np.int64))

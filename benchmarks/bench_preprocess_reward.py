"""preprocess_reward: decoded images to a reward model's 224 pixels, forward and backward.

Its ceiling in float32 is wider: it builds its weights in float32 as PyTorch does, so as to agree with PyTorch's resize
to 1e-6, and both are 1.5e-5 from weights built in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import DTYPES, Case, tensor_bytes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RewardPreprocessing(nn.Module):
    """Clamp, resize, normalise, with the mean and the deviation [C] as buffers.

    The antialiased resize has no bfloat16 on a CPU, so it runs in float32 there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: Tensor, size: int) -> Tensor:
        unit = (image.clamp(-1, 1) + 1) / 2
        if image.device.type == "cpu" and image.dtype is torch.bfloat16:
            unit = unit.float()
        resized = F.interpolate(unit, size=(size, size), mode="bicubic", antialias=True).to(image.dtype)
        return (resized - self.mean) / self.std


@pytest.mark.parametrize("side", [256, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_preprocess_reward(bench, device, side, dtype):
    plain = RewardPreprocessing(MEAN, STD).to(device, dtype)
    shape = (4, 3, side, side)
    # The image and the result once each, and one bit per pixel that says where the clamp passes a gradient.
    one_way = tensor_bytes(1, shape, dtype) + tensor_bytes(1, (4, 3, 224, 224), dtype) + 4 * 3 * side * side // 8
    bench(
        Case(
            "preprocess_reward",
            shape,
            dtype,
            lambda inputs: {"image": inputs.normal(*shape)},
            lambda image, size, mean, std: plain(image, size),
            forward_bytes=one_way,
            backward_bytes=one_way,
            wrt=("image",),
            options={"size": 224, "mean": MEAN, "std": STD},
            ceiling=3e-5,
        )
    )

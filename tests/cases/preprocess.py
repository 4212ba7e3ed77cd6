"""Cases of preprocess_reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import Call, Compiled, Draw, HostCall, Op, Raw, Sizes, leaf, meta

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def formula(
    image: Tensor, size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float], antialias: bool = True
) -> tuple[Tensor, ...]:
    wide = image.double() if image.dtype is torch.float64 else image.float()
    unit = (wide.clamp(-1, 1) + 1) / 2
    size = (size, size) if isinstance(size, int) else size
    resized = F.interpolate(unit, size=size, mode="bicubic", antialias=antialias, align_corners=False)
    mean, std = (torch.tensor(values, dtype=wide.dtype).view(-1, 1, 1) for values in (mean, std))
    return (((resized - mean) / std).to(image.dtype),)


def sweep(d: Choices) -> Case:
    channels = d.size(1, 3)
    image = d.normal(d.batch(), channels, d.size(1, 20), d.size(1, 30))
    # Not to a width of 1: there PyTorch's antialiased resize makes all rows of the first one.
    options = {"size": (d.size(1, 20), d.size(2, 20)), "antialias": d.one_of(True, False)}
    mean, std = MEAN[:channels], STD[:channels]
    return d.case("preprocess_reward", {"image": image}, mean=mean, std=std, **options)


def wrong_arguments() -> wrong.Wrong:
    yield {"image": torch.randn(3, 9, 7)}, r"image: expected \[N, C, H, W\].* got shape \[3, 9, 7\]"
    yield {"image": torch.randn(2, 3, 0, 7)}, r"image: expected \[N, C, H, W\].* got shape \[2, 3, 0, 7\]"
    yield {"image": torch.zeros(2, 3, 9, 7, dtype=torch.uint8)}, "image: expected float32, .* got uint8"
    for size in (0, (5, 0), (5, 5, 5), 5.0, (5.0, 5), "5"):
        yield {"size": size}, "size: expected (an int or|positive ints)"
    for name in ("mean", "std"):
        yield {name: [0.5] * 3}, f"{name}: expected 2 values, one per channel, got 3"
        yield {name: 0.5}, f"{name}: expected a sequence of floats, got float"
        yield {name: torch.ones(3)}, f"{name}: expected a sequence of floats, got Tensor"
        yield {name: [0.5, wrong.NAN]}, f"{name}: expected a finite number, got nan"
    yield {"std": [0.5, 0.0]}, "std: expected a finite number above 0, got 0.0"
    yield {"value_range": (1, -1)}, "value_range: expected low < high"
    yield {"value_range": 1.0}, r"value_range: expected \(low, high\), got 1.0"


def host(sizes: Sizes) -> dict[str, HostCall]:
    image, half = leaf(2, 3, 64, 64), [0.5] * 3
    call = HostCall(lambda: ops.preprocess_reward(image, 28, half, half), [image], launches=[2, 4])
    return {"preprocess_reward": call}


def _of(draw: Draw, resizes: tuple) -> Iterator[Call]:
    for (batch, channels, height, width), size in resizes:
        mean, std = MEAN[:channels], STD[:channels]
        image, grad = draw(batch, channels, height, width), draw(batch, channels, *size)
        if channels == 2:
            image = image.contiguous(memory_format=torch.channels_last)
        inside = draw.bits(batch, channels, height, (width + 7) // 8)
        for antialias in (True, False):
            label = f"{height}x{width}-to-{size[0]}x{size[1]}-{'aa' if antialias else 'plain'}"
            yield Call("preprocess_reward_fwd", label, (image, *size, mean, std, antialias, -1.0, 1.0, True))
            yield Call("preprocess_reward_bwd", label, (grad, inside, width, std, antialias, 0.0, 2.0, image.dtype))


RESIZES = (
    ((2, 3, 37, 51), (24, 17)),
    ((1, 3, 256, 256), (224, 224)),
    ((1, 3, 20, 16), (33, 40)),
    ((2, 1, 5, 7), (5, 7)),
    ((1, 3, 1, 1), (3, 3)),
    ((0, 3, 8, 8), (4, 4)),
    ((1, 2, 9, 600), (7, 5)),
)
SMALL = (((1, 2, 37, 51), (9, 7)), ((1, 1, 6, 5), (11, 12)), ((2, 1, 5, 7), (5, 7)), ((1, 1, 1, 1), (3, 3)))


def large() -> Iterator[Call]:
    image, inside = torch.randn(2, 3, 150, 130), torch.randint(0, 256, (2, 3, 150, 17), dtype=torch.uint8)
    grad, half = torch.randn(2, 3, 96, 112), [0.5] * 3
    yield Call("preprocess_reward_fwd", "large", (image, 96, 112, half, half, True, -1.0, 1.0, True))
    yield Call("preprocess_reward_bwd", "large", (grad, inside, 130, half, True, -1.0, 1.0, torch.float32))


def compiled() -> dict[str, Compiled]:
    from dmdr_fast.backends.triton import preprocess

    image, small, inside = meta(8, 3, 1024, 1024), meta(8, 3, 224, 224), meta(8, 3, 1024, 128, dtype=torch.uint8)
    mean, std = [0.5] * 3, [0.25] * 3
    return {
        "preprocess_reward_fwd": Compiled(
            "preprocess_reward_fwd",
            (image, 224, 224, mean, std, True, -1.0, 1.0, True),
            {"resize_rows_kernel": 4 * 1024, "resize_columns_kernel": 8 * 128},
            launches=3,  # its first use: the table of its filter too
            before=preprocess._tables.clear,
        ),
        "preprocess_reward_bwd": Compiled(
            "preprocess_reward_bwd",
            (small, inside, 1024, std, True, -1.0, 1.0, torch.bfloat16),
            {"resize_rows_bwd_kernel": 8 * 1024, "resize_columns_bwd_kernel": 8 * 128},
            launches=2,
        ),
    }


OPS = {
    "preprocess_reward": Op(
        valid=lambda draw: {"image": draw(3, 2, 9, 7), "size": 5, "mean": [0.5] * 2, "std": [0.25] * 2},
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="image",
        variants={"plain": {"antialias": False, "size": (3, 8)}},
        host=host,
    )
}
RAW = Raw(
    calls=lambda draw: _of(draw, RESIZES),
    small=lambda draw: _of(draw, SMALL),
    large=large,
    compiled=compiled,
    # Bicubic weights come from a filter centre in float32, as PyTorch's do: an ulp of a position of 600 is 6e-5.
    ceilings={"preprocess_reward_fwd": 5e-5, "preprocess_reward_bwd": 5e-5},
)

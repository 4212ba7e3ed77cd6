"""preprocess_reward against the resize's weights written out, against torch's own, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dmdr_fast import ops

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = [(8, 8, 8, 8), (9, 7, 5, 4), (5, 6, 11, 13), (16, 16, 6, 9), (1, 1, 3, 3), (7, 33, 1, 1)]


def cubic(x: float, a: float) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def weights(size_in: int, size_out: int, antialias: bool) -> torch.Tensor:
    """The resizing matrix [out, in] from Keys' cubic (half-pixel centres)."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    scale = size_in / size_out
    for i in range(size_out):
        centre = (i + 0.5) * scale
        if antialias:  # widened by the scale, cut at the borders, normalised
            stretch = max(scale, 1.0)
            taps = range(max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), size_in))
            values = [cubic((j - centre + 0.5) / stretch, -0.5) for j in taps]
            for j, value in zip(taps, values, strict=True):
                matrix[i, j] = value / sum(values)
        else:  # four taps, the border repeated
            source = centre - 0.5
            first = int(source // 1) - 1
            for j in range(first, first + 4):
                matrix[i, min(max(j, 0), size_in - 1)] += cubic(source - j, -0.75)
    return matrix


def formula(image, size, antialias, low=-1.0, high=1.0, mean=MEAN, std=STD):
    unit = (image.double().clamp(low, high) - low) / (high - low)
    vertical, horizontal = (weights(n, m, antialias) for n, m in zip(image.shape[-2:], size, strict=True))
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (mean, std))
    return (vertical @ unit @ horizontal.T - mean) / std


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_float64_matches_the_weights_written_out(sizes, antialias):
    image = torch.randn(2, 3, *sizes[:2], dtype=torch.float64)
    out = ops.preprocess_reward(image, sizes[2:], MEAN, STD, antialias=antialias)
    torch.testing.assert_close(out, formula(image, sizes[2:], antialias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype, antialias):
    image = torch.randn(2, 3, 19, 23).to(dtype)
    out = ops.preprocess_reward(image, (7, 11), MEAN, STD, antialias=antialias)
    truth = formula(image, (7, 11), antialias)
    assert out.dtype is dtype
    # torch's float32 source coordinates are good to 1e-6 of a pixel here, and 1 / std is 4.
    torch.testing.assert_close(out.double(), truth, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("antialias", [True, False])
def test_float32_is_torchs_resize_to_1e_6(antialias):
    image = torch.rand(2, 1, 64, 48)
    out = ops.preprocess_reward(image, (20, 31), (0.0,), (1.0,), antialias=antialias, value_range=(0, 1))
    expected = F.interpolate(image, (20, 31), mode="bicubic", antialias=antialias, align_corners=False)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradient_is_that_of_the_formula(sizes, antialias):
    image = torch.randn(2, 3, *sizes[:2], dtype=torch.float64)
    ours, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
    incoming = torch.randn(2, 3, *sizes[2:], dtype=torch.float64)
    ops.preprocess_reward(ours, sizes[2:], MEAN, STD, antialias=antialias).backward(incoming)
    formula(theirs, sizes[2:], antialias).backward(incoming)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_gradcheck():
    # Away from the ends of the range, where the clamp has a corner.
    image = (torch.rand(1, 3, 5, 9, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.preprocess_reward(x, (3, 4), MEAN, STD), image)


def test_gradient_passes_on_both_ends_of_the_range_and_not_beyond():
    image = torch.tensor([-1.0, 1.0, -1.0001, 1.0001, 0.0, torch.nan, -torch.inf, 2.0, 1.0]).reshape(1, 1, 1, 9)
    image.requires_grad_()
    ops.preprocess_reward(image, (1, 9), (0.0,), (0.5,)).nan_to_num().sum().backward()
    # d out / d image = 1 / (high - low) / std = 1 where it passes.
    assert (image.grad.flatten() != 0).tolist() == [True, True, False, False, True, False, False, False, True]


def test_value_range_and_one_value_for_all_channels():
    image = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    out = ops.preprocess_reward(image, 4, (0.5,), (0.25,), value_range=(0.25, 0.75))
    expected = formula(image, (4, 4), True, 0.25, 0.75, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(out, expected)


def test_strided_images_and_expanded_gradients():
    image = torch.randn(2, 9, 7, 3).permute(0, 3, 1, 2).requires_grad_()
    out = ops.preprocess_reward(image, (5, 5), MEAN, STD)
    assert out.is_contiguous()
    out.sum().backward()
    plain = image.detach().contiguous().requires_grad_()
    ops.preprocess_reward(plain, (5, 5), MEAN, STD).backward(torch.ones(2, 3, 5, 5))
    torch.testing.assert_close(image.grad, plain.grad)


def test_what_is_kept_for_the_backward_is_a_bit_per_pixel():
    image = torch.randn(2, 3, 32, 33, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.preprocess_reward(image, 16, MEAN, STD)
    assert sum(t.nbytes for t in kept) == 2 * 3 * 32 * 5  # ceil(33 / 8) bytes a row


def test_two_backwards_are_bit_equal():
    image = torch.randn(1, 3, 17, 19, requires_grad=True)
    out = ops.preprocess_reward(image, 8, MEAN, STD).square().sum()
    first = torch.autograd.grad(out, image, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, image)[0])


def test_empty_batch():
    image = torch.empty(0, 3, 5, 5, requires_grad=True)
    out = ops.preprocess_reward(image, (3, 4), MEAN, STD)
    out.sum().backward()
    assert out.shape == (0, 3, 3, 4) and image.grad.shape == image.shape

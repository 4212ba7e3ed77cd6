"""The seeded stream of the kernels: its integers, its normals, and that nothing else decides a value."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast.backends.cpu import BACKEND
from tests.raw import RawFunctions

cpu, reference = RawFunctions(BACKEND), RawFunctions(None)

SEED = torch.tensor([-123456789012345, 77 << 33])


@pytest.mark.parametrize("offset", [0, 1, 3, 4 * (2**32 - 5) + 2], ids=["0", "1", "3", "block-past-2^32"])
def test_normals_agree_with_float64_to_1e_6(offset):
    count = 400_001
    truth = reference.normal_noise_fwd([count], SEED, offset, torch.float64)
    drawn = cpu.normal_noise_fwd([count], SEED, offset, torch.float32)
    assert (drawn.double() - truth).abs().max() < 1e-6


def test_small_radii_keep_their_relative_accuracy():
    # u next to 1: the radius is sqrt(-2 ln u), and an absolute error of 1e-7 in the logarithm would show.
    count = 4_000_000
    truth = reference.normal_noise_fwd([count], SEED, 0, torch.float64)
    drawn = cpu.normal_noise_fwd([count], SEED, 0, torch.float32).double()
    cosine_and_sine = truth.view(-1, 2).norm(dim=1)
    small = cosine_and_sine < 3e-3
    assert small.sum() > 5
    radius = drawn.view(-1, 2).norm(dim=1)
    assert ((radius - cosine_and_sine).abs() / cosine_and_sine)[small].max() < 1e-6


def test_a_value_depends_on_seed_and_index_only():
    shape = (6, 5, 7, 3)
    whole = cpu.normal_noise_fwd(list(shape), SEED, 9, torch.float32)
    per_sample = 5 * 7 * 3
    for first, last in ((0, 1), (1, 4), (4, 6)):
        part = cpu.normal_noise_fwd([last - first, 5, 7, 3], SEED, 9 + first * per_sample, torch.float32)
        assert torch.equal(part, whole[first:last])


def test_renoise_draws_what_normal_noise_is():
    x0 = torch.randn(4, 3, 50, 7)[..., :6]
    alpha, sigma = torch.rand(4), torch.rand(4)
    eps = cpu.normal_noise_fwd(list(x0.shape), SEED, 11, torch.float32)
    drawn = cpu.renoise_fwd(x0, alpha, sigma, None, SEED, 11)
    assert torch.equal(drawn, cpu.renoise_fwd(x0, alpha, sigma, eps, None, 0))
    only_noise = cpu.renoise_fwd(torch.zeros_like(x0), torch.zeros(4), torch.ones(4), None, SEED, 11)
    assert torch.equal(only_noise, eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_the_rounded_float32_stream(dtype):
    assert torch.equal(
        cpu.normal_noise_fwd([10_007], SEED, 2, dtype),
        cpu.normal_noise_fwd([10_007], SEED, 2, torch.float32).to(dtype),
    )

"""The seeded noise: the integers of every backend, normals within 1e-6, the same however a batch is cut."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from dmdr_fast.ops._noise import seeded_blocks
from tests.cuda import building
from tests.raw import RawFunctions

reference = RawFunctions(None)


@pytest.fixture(scope="module")
def functions(request) -> ctypes.CDLL:
    return ctypes.CDLL(str(building.device_functions(request.config)))


@pytest.mark.parametrize("seed", [(0, 0), (-1, 1), (12345678901234, -98765), ((1 << 63) - 1, -(1 << 63))])
@pytest.mark.parametrize("first", [0, 7, (1 << 32) - 2, 1 << 40])
def test_integers_are_the_reference_s(functions, seed, first):
    words = np.zeros((5, 4), np.uint32)
    pair = np.array(seed, np.int64)
    functions.philox_words(
        ctypes.c_void_p(pair.ctypes.data), ctypes.c_int64(first), ctypes.c_int64(5), ctypes.c_void_p(words.ctypes.data)
    )
    expected = seeded_blocks(torch.tensor(seed), first, 5).T
    assert words.astype(np.int64).tolist() == expected.tolist()


def test_normals_are_right_for_extreme_words(functions):
    functions.box_muller_error.restype = ctypes.c_double
    assert functions.box_muller_error() < 8.2e-7


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 4 * 10**9 + 4])
@pytest.mark.parametrize("count", [4096, 1001])
def test_normals_agree_with_float64(kernels, offset, count):
    seed = torch.tensor([12345678901234, -98765])
    noise = kernels("normal_noise_fwd", [count], seed, offset, torch.float32)[0]
    truth = reference.normal_noise_fwd([count], seed, offset, torch.float64)
    assert (noise.double() - truth).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 6, 16), (4, 3, 5, 7)])
def test_a_batch_in_parts_draws_the_noise_of_the_whole(kernels, dtype, shape):
    x0, alpha, sigma = torch.randn(shape).to(dtype), torch.rand(4), torch.rand(4)
    seed = torch.tensor([3, 4])
    whole = kernels("renoise_fwd", x0, alpha, sigma, None, seed, 8)[0]
    parts = [
        kernels("renoise_fwd", x0[b : b + 1], alpha[b : b + 1], sigma[b : b + 1], None, seed, 8 + b * x0[0].numel())[0]
        for b in range(4)
    ]
    assert torch.equal(whole, torch.cat(parts))

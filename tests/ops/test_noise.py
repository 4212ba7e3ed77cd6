"""Philox against its published vectors, and the normals against Box-Muller written out element by element."""

from __future__ import annotations

import math

import pytest
import torch

from dmdr_fast import ops
from dmdr_fast.ops._noise import philox4x32, seeded_blocks

PI_COUNTER = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_matches_the_known_answers_of_random123(counter, key, words):
    block = philox4x32(torch.tensor(counter).unsqueeze(1), torch.tensor(key))
    assert block.squeeze(1).tolist() == list(words)


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on python integers."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def python_normal(seed: tuple[int, int], index: int) -> float:
    key, stream = (word & (2**64 - 1) for word in seed)
    block, lane = divmod(index, 4)
    words = python_philox(
        [block & 0xFFFFFFFF, block >> 32, stream & 0xFFFFFFFF, stream >> 32], [key & 0xFFFFFFFF, key >> 32]
    )
    a, b = words[:2] if lane < 2 else words[2:]
    u, theta = ((a >> 8) + 1) * 2.0**-24, (b >> 8) * 2.0**-24
    return math.sqrt(-2 * math.log(u)) * (math.sin if lane % 2 else math.cos)(2 * math.pi * theta)


SEEDS = [(0, 0), (1234, 5), (-1, -2), (2**40 + 7, 3 * 2**33 + 1)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 10, 2**34 - 2])
def test_normals_match_the_formula_at_any_offset(seed, offset):
    drawn = ops.normal_noise(torch.empty(3, 3, dtype=torch.float64), torch.tensor(seed), offset=offset)
    expected = [python_normal(seed, offset + i) for i in range(9)]
    torch.testing.assert_close(drawn.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_the_rounded_float64(dtype):
    seed = torch.tensor([7, 9])
    truth = ops.normal_noise(torch.empty(5, 33, dtype=torch.float64), seed)
    drawn = ops.normal_noise(torch.empty(5, 33, dtype=dtype), seed)
    assert drawn.dtype is dtype
    assert torch.equal(drawn, truth.to(dtype))


def test_a_split_batch_draws_the_noise_of_the_whole():
    seed = torch.tensor([3, 4])
    whole = ops.normal_noise(torch.empty(7, 3, 5), seed)
    parts = [ops.normal_noise(whole[i : i + 1], seed, offset=i * 15) for i in range(7)]
    assert torch.equal(torch.cat(parts), whole)


def test_strides_of_shape_like_do_not_matter():
    seed = torch.tensor([3, 4])
    plain = torch.empty(2, 4, 3, 5)
    strided = plain.to(memory_format=torch.channels_last)
    drawn = ops.normal_noise(strided, seed)
    assert drawn.is_contiguous()
    assert torch.equal(drawn, ops.normal_noise(plain, seed))


def test_key_and_stream_both_select_other_noise():
    like = torch.empty(1000)
    a, b, c = (ops.normal_noise(like, torch.tensor(seed)) for seed in ((1, 2), (2, 2), (1, 3)))
    # Correlation of independent normals over n draws is about n^-1/2 = 0.03.
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1]) < 0.15


def test_moments_are_those_of_a_standard_normal():
    z = ops.normal_noise(torch.empty(200_000, dtype=torch.float64), torch.tensor([11, 0]))
    n = z.numel() ** 0.5
    assert abs(z.mean()) < 4 / n
    assert abs(z.square().mean() - 1) < 4 * 2**0.5 / n
    assert abs(z.pow(3).mean()) < 4 * 15**0.5 / n
    assert abs(z.pow(4).mean() - 3) < 4 * 96**0.5 / n


def test_the_largest_normal_is_that_of_the_smallest_uniform():
    # u = 2^-24 when the top 24 bits of a word are 0: the range is bounded by sqrt(48 ln 2).
    words = seeded_blocks(torch.tensor([0, 0]), 0, 4)
    assert words.min() >= 0 and words.max() < 2**32
    assert ops.normal_noise(torch.empty(100_000), torch.tensor([0, 0])).abs().max() <= math.sqrt(48 * math.log(2))


def test_empty_shapes_draw_nothing():
    assert ops.normal_noise(torch.empty(0, 3), torch.tensor([0, 0])).shape == (0, 3)

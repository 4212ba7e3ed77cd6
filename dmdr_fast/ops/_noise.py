"""The seeded stream of normals: Box-Muller over Philox4x32-10, the counter-based generator behind every seeded draw.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A block of four 32-bit
words is a pure function of a 128-bit counter and a 64-bit key, so any element can be drawn anywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.plans import Live

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 of every counter under one key.

    Args:
        counter: int64 [4, n], each entry an unsigned 32-bit word.
        key: int64 [2], each entry an unsigned 32-bit word.

    Returns:
        int64 [4, n]: the output words r0..r3, each in [0, 2^32).
    """
    # From an arange: a tensor made of python numbers is a copy from the host, which waits for the device.
    second = torch.arange(2, device=counter.device)
    multiplier = (_MULTIPLIERS[0] + (_MULTIPLIERS[1] - _MULTIPLIERS[0]) * second).unsqueeze(1)
    weyl = _WEYL[0] + (_WEYL[1] - _WEYL[0]) * second
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_ROUNDS):
        # int64 wraps like uint64, and the mask undoes the sign that >> drags in: both halves are exact.
        product = even * multiplier
        high, low = (product >> 32) & _MASK, product & _MASK
        even, odd = high.flip(0) ^ odd ^ key.unsqueeze(1), low.flip(0)
        key = (key + weyl) & _MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def seeded_blocks(seed: Tensor, first: int, count: int) -> Tensor:
    """The blocks ``first .. first + count - 1`` of the stream named by ``seed``.

    Args:
        seed: int64 [2] = (key, stream); their 64-bit patterns are used.
        first: number of the first block, >= 0. A block serves four elements.
        count: how many blocks.

    Returns:
        int64 [4, count]: words r0..r3 of each block; counter = (lo32, hi32 of the block number, lo32, hi32 of
        the stream).
    """
    block = torch.arange(first, first + count, device=seed.device, dtype=torch.int64)
    key, stream = seed & _MASK, (seed >> 32) & _MASK
    counter = torch.stack((block & _MASK, (block >> 32) & _MASK, key[1].expand(count), stream[1].expand(count)))
    return philox4x32(counter, torch.stack((key[0], stream[0])))


def seeded_normals(size: list[int], seed: Tensor, offset: Live, dtype: torch.dtype) -> Tensor:
    """The stream's normals: Box-Muller in float64, rounded once."""
    count = math.prod(size)
    first, skip = divmod(offset, 4)
    words = seeded_blocks(seed, first, (skip + count + 3) // 4)
    u = ((words[0::2] >> 8) + 1).double() * 2.0**-24
    theta = (words[1::2] >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), (2.0 * math.pi) * theta
    lanes = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)))  # [cos|sin, pair, block]
    return lanes.permute(2, 1, 0).reshape(-1)[skip : skip + count].to(dtype, copy=True).reshape(size)

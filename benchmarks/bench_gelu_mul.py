"""gelu_mul: GEGLU of a packed projection."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


def gelu_mul(packed: Tensor) -> Tensor:
    """GEGLU."""
    value, gate = packed.chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_mul(bench, dtype):
    shape = (*TOKENS[:2], 2 * TOKENS[2])
    bench(
        Case(
            "gelu_mul",
            shape,
            dtype,
            lambda inputs: {"packed": inputs.normal(*shape)},
            gelu_mul,
            forward_bytes=tensor_bytes(3, TOKENS, dtype),
            backward_bytes=tensor_bytes(5, TOKENS, dtype),
            wrt=("packed",),
        )
    )

"""silu_mul: SwiGLU of a packed projection."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


def silu_mul(packed: Tensor) -> Tensor:
    """SwiGLU."""
    value, gate = packed.chunk(2, dim=-1)
    return value * F.silu(gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(bench, dtype):
    shape = (*TOKENS[:2], 2 * TOKENS[2])
    bench(
        Case(
            "silu_mul",
            shape,
            dtype,
            lambda inputs: {"packed": inputs.normal(*shape)},
            silu_mul,
            forward_bytes=tensor_bytes(3, TOKENS, dtype),
            backward_bytes=tensor_bytes(5, TOKENS, dtype),
            wrt=("packed",),
        )
    )

"""silu_mul: SwiGLU of a packed projection."""

from __future__ import annotations

import pytest

from benchmarks import eager
from benchmarks.case import DTYPES, TOKENS, Case, tensor_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(bench, dtype):
    shape = (*TOKENS[:2], 2 * TOKENS[2])
    bench(
        Case(
            "silu_mul",
            shape,
            dtype,
            lambda inputs: {"packed": inputs.normal(*shape)},
            eager.silu_mul,
            forward_bytes=tensor_bytes(3, TOKENS, dtype),
            backward_bytes=tensor_bytes(5, TOKENS, dtype),
            wrt=("packed",),
        )
    )

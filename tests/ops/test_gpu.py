"""On a GPU: the checks and the reference never wait for the device and give the numbers of the CPU."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast import ops
from tests.cases import OPS, valid_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("op", sorted(OPS))
def test_no_call_waits_for_the_device(op):
    call = valid_calls()[op]
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = getattr(ops, op)(**on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = getattr(ops, op)(**call)
    for ours, theirs in zip(_tensors(out), _tensors(expected), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)


def _tensors(out) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [leaf for part in out for leaf in _tensors(part)]

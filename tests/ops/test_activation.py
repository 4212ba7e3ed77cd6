"""gelu_mul and silu_mul against torch's activations in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dmdr_fast import ops

CALLS = {
    "gelu": (lambda p, **o: ops.gelu_mul(p, **o), F.gelu),
    "gelu_tanh": (
        lambda p, **o: ops.gelu_mul(p, approximate="tanh", **o),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "silu": (lambda p, **o: ops.silu_mul(p, **o), F.silu),
}


def formula(packed, activation, gate_first):
    first, second = packed.chunk(2, -1)
    return activation(first) * second if gate_first else first * activation(second)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 3, 10), (2, 1, 3, 14)])
def test_values_and_gradients(name, gate_first, shape):
    op, activation = CALLS[name]
    packed = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    torch.testing.assert_close(op(packed, gate_first=gate_first), formula(packed, activation, gate_first))
    assert torch.autograd.gradcheck(lambda p: op(p, gate_first=gate_first), packed)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(name, dtype):
    op, activation = CALLS[name]
    packed = (3 * torch.randn(4, 64)).to(dtype).requires_grad_()
    truth = packed.detach().double().requires_grad_()
    incoming = torch.randn(4, 32).to(dtype)
    out = op(packed)
    out.backward(incoming)
    expected = formula(truth, activation, False)
    expected.backward(incoming.double())
    ceiling = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert out.dtype is packed.grad.dtype is dtype
    for ours, theirs in ((out, expected), (packed.grad, truth.grad)):
        assert (ours.double() - theirs).norm() / theirs.norm() < ceiling


@pytest.mark.parametrize("name", CALLS)
def test_far_tails_stay_finite(name):
    op, _ = CALLS[name]
    packed = torch.tensor([[1.0, 1.0, 1.0, -200.0, 200.0, 0.0]], requires_grad=True)
    out = op(packed)
    out.sum().backward()
    torch.testing.assert_close(out, torch.tensor([[0.0, 200.0, 0.0]]))
    torch.testing.assert_close(packed.grad, torch.tensor([[0.0, 200.0, 0.0, 0.0, 1.0, 0.5]]))


def test_strided_and_empty():
    packed = torch.randn(6, 8, dtype=torch.float64).T
    torch.testing.assert_close(ops.silu_mul(packed), formula(packed, F.silu, False))
    assert ops.silu_mul(torch.empty(0, 8)).shape == (0, 4)

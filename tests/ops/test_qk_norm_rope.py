"""qk_norm_rope against torch's rms_norm and rotation by complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dmdr_fast import ops

SHAPE = (2, 5, 3, 8)


def angles(tokens=SHAPE[1], width=SHAPE[3], batch=None):
    """One angle per token and pair [.., T, D / 2]."""
    lead = () if batch is None else (batch,)
    return torch.rand(*lead, tokens, width // 2, dtype=torch.float64) * 6


def tables(theta, interleaved):
    """cos and sin [.., T, D] as the ops take them."""
    repeat = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    return repeat(theta.cos()), repeat(theta.sin())


def rotated(y, theta, interleaved):
    """Each pair as a complex number times e^(i theta)."""
    theta = theta.unsqueeze(-2)
    first, second = (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
    turned = torch.complex(first.contiguous(), second.contiguous()) * torch.polar(torch.ones_like(theta), theta)
    if interleaved:
        return torch.stack((turned.real, turned.imag), -1).flatten(-2)
    return torch.cat((turned.real, turned.imag), -1)


def formula(x, weight, theta, interleaved, eps=1e-6):
    y = F.rms_norm(x.double(), x.shape[-1:], None if weight is None else weight.double(), eps)
    return y if theta is None else rotated(y, theta, interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("batch", [None, SHAPE[0]])
def test_norm_and_rotation(interleaved, weighted, batch):
    q, k = torch.randn(SHAPE, dtype=torch.float64), torch.randn(2, 5, 1, 8, dtype=torch.float64)
    weights = [torch.randn(8, dtype=torch.float64) if weighted else None for _ in range(2)]
    theta = angles(batch=batch)
    out = ops.qk_norm_rope(q, k, *weights, *tables(theta, interleaved), interleaved=interleaved)
    for ours, x, weight in zip(out, (q, k), weights, strict=True):
        torch.testing.assert_close(ours, formula(x, weight, theta, interleaved))


def test_one_norm_over_all_heads():
    """As Wan has it: RMSNorm over all heads together, then every head is rotated by the same angles."""
    q, k = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    weights, theta = torch.randn(2, 24, dtype=torch.float64), angles()
    as_one = [x.flatten(2).unsqueeze(2) for x in (q, k)]
    out = ops.qk_norm_rope(*as_one, *weights, *(table.repeat(1, SHAPE[2]) for table in tables(theta, True)))
    for ours, x, weight in zip(out, (q, k), weights, strict=True):
        normal = F.rms_norm(x.flatten(2), (24,), weight, 1e-6).view(SHAPE)
        torch.testing.assert_close(ours.view(SHAPE), rotated(normal, theta, True))


def test_without_rotation():
    q, k, weight = torch.randn(SHAPE).double(), torch.randn(SHAPE).double(), torch.randn(7 + 1).double()
    out_q, out_k = ops.qk_norm_rope(q, k, weight, None, eps=1e-5)
    torch.testing.assert_close(out_q, formula(q, weight, None, True, 1e-5))
    torch.testing.assert_close(out_k, formula(k, None, None, True, 1e-5))
    odd = torch.randn(2, 3, 1, 7).double()
    torch.testing.assert_close(ops.qk_norm_rope(odd, odd)[0], formula(odd, None, None, True))


@pytest.mark.parametrize("interleaved", [True, False])
def test_gradcheck(interleaved):
    q, k = (torch.randn(2, 3, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    weights = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    cos, sin = tables(angles(3, 4), interleaved)
    assert torch.autograd.gradcheck(
        lambda *t: ops.qk_norm_rope(*t, cos, sin, interleaved=interleaved), (q, k, *weights)
    )


@pytest.mark.parametrize("interleaved", [True, False])
def test_tables_are_read_lane_by_lane(interleaved):
    # Not a rotation any more: cos and sin differ within a pair, and the gradient follows.
    q = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: ops.qk_norm_rope(q, q, None, None, cos, sin, interleaved=interleaved), q)


@pytest.mark.parametrize("used", [0, 1])
def test_one_unused_result_gets_no_gradient(used):
    q, k, wq, wk = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (SHAPE, SHAPE, (8,), (8,)))
    ops.qk_norm_rope(q, k, wq, wk)[used].square().sum().backward()
    got = [t.grad is not None for t in (q, k, wq, wk)]
    assert got == ([True, False, True, False] if used == 0 else [False, True, False, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    packed = torch.randn(2, 5, 3, 4, 8).to(dtype)
    q, k, _ = packed.unbind(2)  # views of a packed projection
    weight = torch.randn(8).to(dtype)
    theta = angles()
    cos, sin = (t.float() for t in tables(theta, True))
    out = ops.qk_norm_rope(q, k, weight, weight, cos, sin)
    for ours, x in zip(out, (q, k), strict=True):
        assert ours.dtype is dtype and ours.is_contiguous()
        truth = formula(x, weight, theta, True)
        torch.testing.assert_close(ours.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_gradients(dtype):
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in (SHAPE, SHAPE, (8,), (8,))]
    truth = [t.detach().double().requires_grad_() for t in leaves]
    theta = angles()
    incoming = [torch.randn(SHAPE).to(dtype) for _ in range(2)]
    torch.autograd.backward(ops.qk_norm_rope(*leaves, *tables(theta, True)), incoming)
    for x, weight, grad in zip(truth[:2], truth[2:], incoming, strict=True):
        formula(x, weight, theta, True).backward(grad.double())
    for ours, theirs in zip(leaves, truth, strict=True):
        assert ours.grad.dtype is dtype
        ceiling = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < ceiling


def test_empty_batch():
    q = torch.empty(0, 5, 3, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    out, _ = ops.qk_norm_rope(q, q, weight, None)
    out.sum().backward()
    assert q.grad.shape == q.shape and torch.equal(weight.grad, torch.zeros(8))

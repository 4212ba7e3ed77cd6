"""multi_lora against one dense weight per sample."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmdr_fast import ops


def inputs(dtype=torch.float64, batch=4, middle=(5,), features=(6, 7), rank=3):
    x = torch.randn(batch, *middle, features[0]).to(dtype)
    base = torch.randn(batch, *middle, features[1]).to(dtype)
    a, b = torch.randn(features[0], rank).to(dtype), torch.randn(rank, features[1]).to(dtype)
    return x, base, a, b, torch.tensor([2.0, 0.75, 0.0, -1.0])[:batch]


def dense(x, base, a, b, scale):
    """One dense update weight per sample, in float64."""
    x, base, a, b, scale = (t.double() for t in (x, base, a, b, scale))
    return base + torch.einsum("b...i,bio->b...o", x, scale.reshape(-1, 1, 1) * (a @ b))


@pytest.mark.parametrize("middle", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward(middle, dtype):
    tensors = inputs(dtype, middle=middle)
    out = ops.multi_lora(*tensors)
    truth = dense(*tensors)
    assert out.dtype is dtype and out.is_contiguous()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    tensors = [t.requires_grad_() for t in inputs()[:4]]
    scale = inputs()[4]
    assert torch.autograd.gradcheck(lambda *t: ops.multi_lora(*t, scale), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_the_dense_update(dtype):
    tensors = inputs(dtype)
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    truth = [t.double().requires_grad_() for t in tensors[:4]]
    incoming = torch.randn(4, 5, 7).to(dtype)
    ops.multi_lora(*leaves, tensors[4]).backward(incoming)
    dense(*truth, tensors[4]).backward(incoming.double())
    for leaf, expected in zip(leaves, truth, strict=True):
        assert leaf.grad.dtype is dtype
        assert (leaf.grad.double() - expected.grad).norm() <= torch.finfo(dtype).eps * 4 * expected.grad.norm()


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (2, 3), (0, 2)])
def test_only_what_is_trained_gets_a_gradient(trained):
    tensors = inputs()
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors[:4])]
    everything = [t.clone().requires_grad_() for t in tensors[:4]]
    ops.multi_lora(*leaves, tensors[4]).sum().backward()
    ops.multi_lora(*everything, tensors[4]).sum().backward()
    for i, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
        assert (leaf.grad is None) if i not in trained else torch.equal(leaf.grad, full.grad)


def test_scale_zero_returns_the_base_and_adds_no_gradient():
    x, base, a, b, scale = inputs(torch.float32)
    b.requires_grad_()
    out = ops.multi_lora(x, base, a, b, scale)
    assert torch.equal(out[2], base[2])
    out[2].sum().backward()
    assert torch.equal(b.grad, torch.zeros_like(b))


def test_a_number_scales_every_sample():
    x, base, a, b, _ = inputs()
    assert torch.equal(ops.multi_lora(x, base, a, b, 0.5), ops.multi_lora(x, base, a, b, torch.full((4,), 0.5)))


@pytest.mark.parametrize("scale", [torch.tensor([2.0, 0.0, -0.5]), torch.tensor(0.75)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_packed_projection_is_its_own_input(dtype, scale):
    packed = torch.randn(3, 5, 18).to(dtype)
    a, b = torch.randn(2, 6, 2).to(dtype), torch.randn(2, 2, 6).to(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (packed, a, b)]
    truth = [tensor.double().requires_grad_() for tensor in (packed, a, b)]
    out = ops.multi_lora(leaves[0], *leaves, scale)
    q, k, v = truth[0].chunk(3, -1)
    q, v = (dense(x, x, truth[1][i], truth[2][i], scale.expand(3)) for i, x in enumerate((q, v)))
    exact = torch.cat((q, k, v), -1)
    assert torch.equal(out.chunk(3, -1)[1], packed.chunk(3, -1)[1])
    incoming = torch.randn(3, 5, 18).to(dtype)
    out.backward(incoming)
    exact.backward(incoming.double())
    for ours, theirs in zip(
        (out, *(leaf.grad for leaf in leaves)), (exact, *(leaf.grad for leaf in truth)), strict=True
    ):
        assert (ours.double() - theirs).norm() <= torch.finfo(dtype).eps * 4 * theirs.norm()


def test_mixed_dtypes_follow_the_base_output():
    x, base, a, b, scale = inputs(torch.float32)
    out = ops.multi_lora(x, base.bfloat16(), a, b.half(), scale)
    assert out.dtype is torch.bfloat16
    truth = dense(x, base.bfloat16(), a, b.half(), scale)
    torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=2**-8)


def test_autocast_does_not_reach_the_arithmetic():
    tensors = inputs(torch.float32)
    expected = ops.multi_lora(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.multi_lora(*tensors), expected)


def test_flops_are_counted():
    x, base, a, b, scale = inputs(torch.float32, batch=4, middle=(5,), features=(6, 7), rank=3)
    a.requires_grad_()
    b.requires_grad_()
    rows = 4 * 5
    with FlopCounterMode(display=False) as forward:
        out = ops.multi_lora(x, base, a, b, scale)
    assert forward.get_total_flops() == 2 * rows * 3 * (6 + 7)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * rows * 3 * (7 + 6 + 7)


def test_empty_batch():
    x, base, a, b, scale = (t[:0] if i in (0, 1, 4) else t for i, t in enumerate(inputs()))
    a.requires_grad_()
    ops.multi_lora(x, base, a, b, scale).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))

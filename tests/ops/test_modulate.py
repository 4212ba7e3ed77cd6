"""Adaptive norms and gated residuals against torch.nn.functional's norms in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dmdr_fast import ops
from tests.cases import OPS, valid_calls

BATCH, TOKENS, WIDTH = 3, 4, 8
LAYOUTS = [(WIDTH,), (BATCH, WIDTH), (BATCH, 1, WIDTH), (BATCH, TOKENS, WIDTH)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def over_tokens(value):
    return value.unsqueeze(1) if value.dim() == 2 else value


def norm_formula(x, shift, scale, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + over_tokens(scale)) + over_tokens(shift)


def residual_formula(x, h, gate):
    return x + over_tokens(gate) * h


def draws(*shapes, dtype=torch.float64):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


X = (BATCH, TOKENS, WIDTH)


# Ops whose vectors modulate tokens, and the same without an optional weight.
MODULATED = [
    pytest.param(op, changes, id=", no ".join((op, *changes)))
    for op, about in OPS.items()
    if about.vectors
    for changes in ({}, *([{"weight": None}] if "weight" in about.wrt.split() else []))
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "changes"), MODULATED)
def test_every_layout_of_the_vectors(op, changes, layout):
    about = OPS[op]
    call = valid_calls(torch.float64)[op] | changes
    call = {name: torch.randn(layout).double() if name in about.vectors.split() else call[name] for name in call}
    leaves = [name for name, value in call.items() if value is not None]

    def function(*tensors):
        return results_of(op, **call | dict(zip(leaves, tensors, strict=True)))

    tensors = [call[name].requires_grad_() for name in leaves]
    torch.testing.assert_close(function(*tensors), list(about.formula(**call)))
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_layout", LAYOUTS[:2])
def test_a_gate_of_another_layout(layout, gate_layout):
    tensors = draws(X, X, gate_layout, layout, layout)
    x, h, gate, shift, scale = tensors
    residual, modulated = ops.gated_residual_layer_norm_modulate(*tensors)
    torch.testing.assert_close(residual, residual_formula(x, h, gate))
    torch.testing.assert_close(modulated, norm_formula(residual_formula(x, h, gate), shift, scale))
    assert torch.autograd.gradcheck(ops.gated_residual_layer_norm_modulate, tensors)


def test_the_gated_residual_of_an_rms_norm_that_feeds_itself():
    x, gate, weight = draws(X, (WIDTH,), (WIDTH,))
    assert torch.autograd.gradcheck(lambda x, *rest: ops.gated_residual_rms_norm(x, x, *rest), (x, gate, weight))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", [op for op, about in OPS.items() if about.vectors])
def test_modulation_per_frame(op, backend, monkeypatch):
    """[B, F, 1, D] beside [B, F, S, D]: as the formula broadcasts it, and as frames that are samples of their own."""
    monkeypatch.setenv("DMDR_FAST_BACKEND", backend)
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")
    shapes = {"x": (2, 3, 5, 16), "h": (2, 3, 5, 16), "weight": (16,)}
    names = OPS[op].wrt.split()
    tensors = dict(
        zip(names, draws(*(shapes.get(name, (2, 3, 1, 16)) for name in names), dtype=torch.float32), strict=True)
    )
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    samples = {name: tensor.detach().flatten(0, 1) if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}

    results = results_of(op, **tensors)
    assert all(map(torch.equal, results_of(op, **samples), (result.flatten(0, 1) for result in results)))
    truth = OPS[op].formula(**exact)
    torch.testing.assert_close([r.double() for r in results], list(truth), rtol=1e-5, atol=2e-6)
    incoming = [torch.randn_like(result) for result in results]
    grads = torch.autograd.grad(results, list(tensors.values()), incoming)
    expected = torch.autograd.grad(truth, list(exact.values()), [value.double() for value in incoming])
    torch.testing.assert_close([g.double() for g in grads], list(expected), rtol=1e-5, atol=1e-5)


def results_of(op, **tensors):
    result = getattr(ops, op)(**tensors)
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_may_go_unused(used):
    tensors = draws(X, X, LAYOUTS[1], LAYOUTS[1], LAYOUTS[1])
    assert torch.autograd.gradcheck(lambda *t: ops.gated_residual_layer_norm_modulate(*t)[used], tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_lower_precision_rounds_once(dtype, out_dtype):
    x, shift, scale = draws((4, 16, 96), (4, 96), (4, 96), dtype=dtype)
    out = ops.layer_norm_modulate(x, shift, scale, out_dtype=out_dtype)
    truth = norm_formula(x.double(), shift.double(), scale.double())
    assert out.dtype is (out_dtype or dtype)
    torch.testing.assert_close(out.double(), truth, rtol=torch.finfo(out.dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lower_precision_gradients(dtype):
    tensors = draws((4, 16, 96), (4, 16, 96), (4, 96), (4, 96), (4, 96), dtype=dtype)
    truth = [t.detach().double().requires_grad_() for t in tensors]
    incoming = [torch.randn(4, 16, 96).to(dtype) for _ in range(2)]
    torch.autograd.backward(ops.gated_residual_layer_norm_modulate(*tensors), incoming)
    residual = residual_formula(*truth[:3])
    torch.autograd.backward((residual, norm_formula(residual, *truth[3:])), [g.double() for g in incoming])
    ceiling = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    for ours, theirs in zip(tensors, truth, strict=True):
        assert ours.grad.dtype is dtype
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < ceiling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_op_is_the_two_ops(dtype):
    tensors = draws(X, X, *[(BATCH, WIDTH)] * 3, dtype=dtype)
    x, h, gate, shift, scale = tensors
    residual, modulated = ops.gated_residual_layer_norm_modulate(*tensors)
    assert torch.equal(residual, ops.gated_residual(x, h, gate))
    assert torch.equal(modulated, ops.layer_norm_modulate(residual, shift, scale))


@pytest.mark.parametrize("shape", [(3, 8), (3, 2, 4, 8), (1, 2, 2, 2, 8)])
def test_any_rank(shape):
    x, h, gate, shift, scale = draws(shape, shape, *[(shape[0], 8)] * 3)
    middle = [1] * (len(shape) - 2)
    gate_, shift_, scale_ = (t.reshape(shape[0], *middle, 8) for t in (gate, shift, scale))
    residual, modulated = ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale)
    torch.testing.assert_close(residual, x + gate_ * h)
    torch.testing.assert_close(modulated, F.layer_norm(residual, (8,), eps=1e-6) * (1 + scale_) + shift_)
    # One row of modulation per sample may also have x's rank, and one per token x's shape.
    assert torch.equal(ops.layer_norm_modulate(x, shift_, scale_), ops.layer_norm_modulate(x, shift, scale))
    full = [t.expand(shape) for t in (shift_, scale_)]
    assert torch.equal(ops.layer_norm_modulate(x, *full), ops.layer_norm_modulate(x, shift, scale))


def test_mixed_dtypes():
    x, h, gate = torch.randn(X).bfloat16(), torch.randn(X), torch.randn(BATCH, WIDTH).half().requires_grad_()
    out = ops.gated_residual(x, h, gate)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, (x.float() + gate.float().unsqueeze(1) * h).bfloat16())
    out.sum().backward()
    assert gate.grad.dtype is torch.float16


def test_chunks_of_one_projection_are_read_as_views():
    x = torch.randn(X, dtype=torch.float64)
    shift, scale, gate = torch.randn(BATCH, 3 * WIDTH, dtype=torch.float64).chunk(3, -1)
    out = ops.layer_norm_modulate(x.transpose(0, 1).contiguous().transpose(0, 1), shift, scale)
    assert out.is_contiguous()
    torch.testing.assert_close(out, norm_formula(x, shift, scale))
    torch.testing.assert_close(ops.gated_residual(x, x, gate), residual_formula(x, x, gate))


def test_large_means_do_not_cancel():
    x = torch.randn(2, 3, 64, dtype=torch.float64) + 1e3
    zero = torch.zeros(64)
    out = ops.layer_norm_modulate(x.float(), zero, zero)
    truth = F.layer_norm(x.float().double(), (64,), eps=1e-6)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-4)  # float32 mean of 1e3 is good to 6e-5


def test_nothing_is_written_over_and_two_backwards_are_bit_equal():
    tensors = draws(X, X, *[(BATCH, WIDTH)] * 3, dtype=torch.float32)
    copies = [t.detach().clone() for t in tensors]
    incoming = [torch.randn(X), torch.randn(X)]
    kept = [g.clone() for g in incoming]
    outputs = ops.gated_residual_layer_norm_modulate(*tensors)
    first = torch.autograd.grad(outputs, tensors, incoming, retain_graph=True)
    second = torch.autograd.grad(outputs, tensors, incoming)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([*tensors, *incoming], [*copies, *kept], strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
def test_empty(shape):
    x, h, gate, shift, scale = draws(shape, shape, *[(shape[0], 8)] * 3)
    residual, modulated = ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale)
    (residual.sum() + modulated.sum()).backward()
    assert x.grad.shape == shape and torch.equal(shift.grad, torch.zeros_like(shift))

"""dmd_gradient and dmd_loss against the formulas as the code bases write them: denoised samples, float64."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from dmdr_fast import ops
from dmdr_fast.algorithm.dmd import DMDOptions
from dmdr_fast.config import Config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape=(3, 4, 5), dtype=torch.float64, uncond=True):
    x0, x_t, fake, real, free = (torch.randn(shape).to(dtype) for _ in range(5))
    return [x0, x_t, fake, real, free if uncond else None]


def broadcast(value, like):
    return value.reshape(-1, *[1] * (like.dim() - 1))


def denoised(prediction, space, x_t, sigma, alpha):
    return {
        "flow": lambda: x_t - sigma * prediction,
        "eps": lambda: (x_t - sigma * prediction) / alpha,
        "v": lambda: alpha * x_t - sigma * prediction,
        "x0": lambda: prediction,
    }[space]()


def formula(
    tensors,
    sigma,
    alpha=None,
    cfg=None,
    cfg_mode="standard",
    prediction="flow",
    normalizer="per_sample",
    eps=1e-8,
    eps_mode="add",
    mask=None,
    weight=None,
):
    """(g, n [B], loss) before any nan policy, in float64, with guidance applied to the denoised samples."""
    x0, x_t, fake, real, uncond = (None if tensor is None else tensor.double() for tensor in tensors)
    sigma = broadcast(sigma.double(), x0)
    alpha = 1 - sigma if alpha is None else broadcast(alpha.double(), x0)
    fake, real = (denoised(p, prediction, x_t, sigma, alpha) for p in (fake, real))
    if uncond is not None:
        uncond = denoised(uncond, prediction, x_t, sigma, alpha)
        cfg = broadcast(torch.as_tensor(cfg).double(), x0)
        real = (uncond if cfg_mode == "standard" else real) + cfg * (real - uncond)
    selected = torch.ones_like(x0) if mask is None else mask.expand_as(x0).double()
    per_dims = tuple(range(1, x0.dim())) if normalizer == "per_sample" else tuple(range(x0.dim()))
    p_real = x0 - real
    norm = (p_real.abs() * selected).sum(per_dims, keepdim=True) / selected.sum(per_dims, keepdim=True)
    if eps_mode == "add":
        norm = norm + eps
    elif eps_mode == "clamp":
        norm = norm.clamp(min=eps)
    if normalizer == "none":
        norm = torch.ones_like(norm)
    norm = norm.expand(x0.shape[0], *norm.shape[1:])
    g = (p_real - (x0 - fake)) / norm * selected
    if weight is not None:
        g = broadcast(weight.double(), x0) * g
    return g, norm.flatten(), 0.5 * g.square().sum() / selected.sum()


VARIANTS = list(
    itertools.product(
        ["flow", "eps", "v", "x0"],
        [None, "standard", "offset"],
        ["per_sample", "global", "none"],
        ["add", "clamp", "none"],
    )
)


@pytest.mark.parametrize(("prediction", "cfg_mode", "normalizer", "eps_mode"), VARIANTS)
def test_every_variant_in_float64(prediction, cfg_mode, normalizer, eps_mode):
    tensors = inputs(uncond=cfg_mode is not None)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    cfg = None if cfg_mode is None else 3.5
    options = {
        "prediction": prediction,
        "cfg_mode": cfg_mode or "standard",
        "normalizer": normalizer,
        "eps_mode": eps_mode,
    }
    # 0.7 is inside the range of the normalisers, so "clamp" clamps some and not others.
    out = ops.dmd_gradient(*tensors, sigma=sigma, cfg_scale=cfg, eps=0.7, **options)
    g, norm, loss = formula(tensors, sigma, cfg=cfg, eps=0.7, **options)
    torch.testing.assert_close(out.grad, g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.weight, norm, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(1, 7), (2, 3), (3, 4, 5), (2, 4, 3, 5), (2, 3, 2, 4, 3), (1, 2, 3, 2, 3, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rank_and_dtype(shape, dtype):
    tensors = inputs(shape, dtype)
    sigma = torch.linspace(0.2, 0.8, shape[0])
    out = ops.dmd_gradient(*tensors, sigma=sigma, cfg_scale=2.0)
    g, norm, loss = formula(tensors, sigma, cfg=2.0)
    assert out.grad.dtype is dtype and out.weight.dtype is out.loss.dtype is torch.float32
    # One rounding to the output's dtype on top of float32 arithmetic.
    torch.testing.assert_close(out.grad.double(), g, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(out.weight.double(), norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=0)


def test_mixed_dtypes_and_output_dtype():
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)
    tensors = [tensor.to(dtype) for tensor, dtype in zip(inputs(), dtypes, strict=True)]
    sigma = torch.tensor([0.1, 0.5, 0.9])
    out = ops.dmd_gradient(*tensors, sigma=sigma, cfg_scale=2.0, out_dtype=torch.bfloat16)
    g, _, _ = formula(tensors, sigma, cfg=2.0)
    assert out.grad.dtype is torch.bfloat16
    torch.testing.assert_close(out.grad.double(), g, rtol=2**-8, atol=1e-5)


def test_small_gradients_survive_bfloat16():
    # rms(g) = 0.01 against rms(x0) = 1: a bfloat16 pseudo-target x0 - g loses 17 % of it.
    x0, x_t = torch.randn(4, 4096), torch.randn(4, 4096)
    real = torch.randn(4, 4096)
    fake = (real + 0.01 * torch.randn(4, 4096)).bfloat16()
    tensors = [t.bfloat16() for t in (x0, x_t, fake, real)] + [None]
    sigma = torch.full((4,), 0.5)
    g, _, _ = formula(tensors, sigma, normalizer="none")
    out = ops.dmd_gradient(*tensors, sigma=sigma, normalizer="none").grad.double()
    assert (out - g).norm() / g.norm() < 4e-3


def test_schedules_weights_and_scales_per_sample():
    tensors = inputs()
    sigma, alpha = torch.rand(3).double(), torch.rand(3).double() + 0.5
    weight, cfg = torch.rand(3).double(), torch.tensor([1.0, 3.0, 10.0]).double()
    out = ops.dmd_gradient(*tensors, sigma=sigma, alpha=alpha, cfg_scale=cfg, weight=weight, prediction="eps")
    g, norm, loss = formula(tensors, sigma, alpha, cfg, weight=weight, prediction="eps")
    torch.testing.assert_close(out.grad, g)
    torch.testing.assert_close(out.weight, norm)
    torch.testing.assert_close(out.loss, loss)


@pytest.mark.parametrize("normalizer", ["per_sample", "global"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_masked_means_ignore_what_is_masked(normalizer, kind):
    tensors = inputs()
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]).reshape(3, 4, 1)
    g, norm, loss = formula(tensors, sigma, cfg=2.0, normalizer=normalizer, mask=mask)
    hidden = (mask == 0).expand_as(tensors[0])
    for tensor in tensors:
        tensor[hidden] = torch.nan  # padding may hold anything
    out = ops.dmd_gradient(
        *tensors, sigma=sigma, cfg_scale=2.0, normalizer=normalizer, mask=mask.to(kind), nan_policy="keep"
    )
    torch.testing.assert_close(out.grad, g)
    torch.testing.assert_close(out.weight, norm)
    torch.testing.assert_close(out.loss, loss)


def test_a_sample_that_the_mask_empties_gets_no_gradient():
    tensors = inputs()
    mask = torch.ones(3, 1, 1, dtype=torch.bool)
    mask[1] = False
    out = ops.dmd_gradient(*tensors, sigma=0.5, cfg_scale=2.0, mask=mask, eps=0.0, nan_policy="keep")
    whole = ops.dmd_gradient(*tensors, sigma=0.5, cfg_scale=2.0, eps=0.0)
    assert torch.equal(out.grad[1], torch.zeros(4, 5).double())
    assert torch.equal(out.grad[::2], whole.grad[::2])


def poisoned(dtype=torch.float32):
    """x0 = 0, real = 0 and g = fake (x0 space, no normaliser), with a NaN and infinities in sample 0 only."""
    fake = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0], [2.0, 3.0, 4.0, 5.0]]).to(dtype)
    zero = torch.zeros(2, 4, dtype=dtype)
    return zero, zero, fake, zero


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_policies(dtype):
    largest = torch.finfo(dtype).max
    expected = {
        "zero": [0.0, 0.0, 0.0, 1.0],
        "torch": [0.0, largest, -largest, 1.0],
        "zero_sample": [0.0] * 4,
        "keep": [torch.nan, torch.inf, -torch.inf, 1.0],
    }
    for policy, first in expected.items():
        out = ops.dmd_gradient(*poisoned(dtype), sigma=0.5, prediction="x0", normalizer="none", nan_policy=policy)
        rows = torch.tensor([first, [2.0, 3.0, 4.0, 5.0]], dtype=dtype)
        torch.testing.assert_close(out.grad, rows, rtol=0, atol=0, equal_nan=True)
        if policy in ("zero", "zero_sample"):
            torch.testing.assert_close(out.loss, 0.5 * rows.float().square().mean())


def test_what_is_not_finite_stays_by_default_as_in_the_configuration():
    """A NaN that a default hides is a wrong update that nobody counts."""
    default = Config.model_fields["dmd"].default.nan_policy
    assert DMDOptions().nan_policy == default
    options = {"sigma": 0.5, "prediction": "x0", "normalizer": "none"}
    for op in (ops.dmd_gradient, ops.dmd_loss):
        assert inspect.signature(op).parameters["nan_policy"].default == default
    assert ops.dmd_gradient(*poisoned(torch.float32), **options).grad.isnan().any()
    assert ops.dmd_loss(*poisoned(torch.float32), **options).isnan()


def test_torch_policy_is_nan_to_num_in_the_output_dtype():
    zero, _, fake, _ = poisoned()
    fake[1, 0] = 1e5  # finite in float32, infinite in float16
    for out_dtype in DTYPES:
        out = ops.dmd_gradient(
            zero,
            zero,
            fake,
            zero,
            sigma=0.5,
            prediction="x0",
            normalizer="none",
            nan_policy="torch",
            out_dtype=out_dtype,
        )
        assert torch.equal(out.grad, torch.nan_to_num(fake.to(out_dtype)))


def test_overflow_of_the_output_dtype_is_what_the_other_policies_see():
    zero = torch.zeros(1, 2)
    fake = torch.tensor([[1e5, 1.0]])
    options = {"sigma": 0.5, "prediction": "x0", "normalizer": "none", "out_dtype": torch.float16}
    assert ops.dmd_gradient(zero, zero, fake, zero, nan_policy="zero", **options).grad.tolist() == [[0.0, 1.0]]
    assert ops.dmd_gradient(zero, zero, fake, zero, nan_policy="zero_sample", **options).grad.tolist() == [[0.0, 0.0]]


def test_gradient_has_no_autograd():
    tensors = [t.requires_grad_() for t in inputs()]
    out = ops.dmd_gradient(*tensors, sigma=0.5, cfg_scale=2.0)
    assert not any(value.requires_grad for value in out)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_mse_to_the_pseudo_target_with_its_gradient(reduction, factor, masked):
    tensors = inputs()
    x0 = tensors[0].requires_grad_()
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1]).reshape(1, 4, 1).expand(3, 4, 1) if masked else None
    loss = ops.dmd_loss(*tensors, sigma=sigma, cfg_scale=2.0, mask=mask, reduction=reduction, factor=factor)
    (3 * loss).backward()

    g, _, _ = formula([t.detach() for t in tensors], sigma, cfg=2.0, mask=mask)
    leaf = x0.detach().clone().requires_grad_()
    squares = (leaf - (leaf - g).detach()).square()
    count = squares.numel() * (0.75 if masked else 1.0)
    expected = factor * squares.sum() / (count if reduction == "mean" else 1)
    (3 * expected).backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(x0.grad, leaf.grad)


def test_loss_trains_x0_only():
    tensors = [t.requires_grad_() for t in inputs()]
    sigma = torch.full((3,), 0.5, requires_grad=True)
    ops.dmd_loss(*tensors, sigma=sigma, cfg_scale=2.0).backward()
    assert tensors[0].grad is not None
    assert all(t.grad is None for t in (*tensors[1:], sigma))


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_injects_g_scaled_and_nothing_else(dtype):
    tensors = inputs(dtype=dtype)
    tensors[0].requires_grad_()
    g = ops.dmd_gradient(*tensors, sigma=0.5, cfg_scale=2.0).grad
    ops.dmd_loss(*tensors, sigma=0.5, cfg_scale=2.0, reduction="sum").backward()
    assert torch.equal(tensors[0].grad, g)


def test_loss_differentiates_through_the_generator():
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    noise, x_t, fake, real, uncond = inputs((3, 5))
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x0 = noise @ weight
    ops.dmd_loss(x0, x_t, fake, real, uncond, sigma=sigma, cfg_scale=2.0).backward()
    g, _, _ = formula([x0.detach(), x_t, fake, real, uncond], sigma, cfg=2.0)
    torch.testing.assert_close(weight.grad, noise.T @ g / g.numel())


def test_two_runs_and_two_backwards_are_bit_equal():
    tensors = inputs((3, 17, 5), torch.float32)
    x0 = tensors[0].requires_grad_()
    copies = [t.detach().clone() for t in tensors]
    loss = ops.dmd_loss(*tensors, sigma=0.5, cfg_scale=2.0)
    first = torch.autograd.grad(loss, x0, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x0)[0]
    again = torch.autograd.grad(ops.dmd_loss(*tensors, sigma=0.5, cfg_scale=2.0), x0)[0]
    assert torch.equal(first, second) and torch.equal(first, again)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_last_backward_of_a_root_is_handed_what_the_forward_kept(backend, dtype, monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", backend)
    tensors = inputs((3, 17, 5), dtype)
    x0 = tensors[0].requires_grad_()
    g = ops.dmd_gradient(*tensors, sigma=0.5, cfg_scale=2.0, out_dtype=torch.float32).grad
    loss = ops.dmd_loss(*tensors, sigma=0.5, cfg_scale=2.0)
    kept = loss.grad_fn.saved_tensors[0].data_ptr()
    (first,) = torch.autograd.grad(loss, x0, retain_graph=True)
    assert first.data_ptr() != kept
    expected = first.clone()
    first.zero_()  # the caller's own: the next backward must not see it
    (weighted,) = torch.autograd.grad(2 * loss, x0, retain_graph=True)
    torch.testing.assert_close(weighted, 2 * expected)
    loss.backward()
    assert torch.equal(x0.grad, expected)
    # float16 cannot hold g / numel of a large latent, so there it is g that is kept.
    assert (x0.grad.data_ptr() == kept) == (dtype is not torch.float16)
    torch.testing.assert_close(x0.grad.float(), g / g.numel(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_kept_gradient_of_another_dtype_is_converted():
    tensors = inputs((3, 17, 5), torch.bfloat16)
    x0 = tensors[0].requires_grad_()
    ops.dmd_loss(*tensors, sigma=0.5, cfg_scale=2.0, out_dtype=torch.float32).backward()
    g = ops.dmd_gradient(*tensors, sigma=0.5, cfg_scale=2.0, out_dtype=torch.float32).grad
    assert x0.grad.dtype is torch.bfloat16
    torch.testing.assert_close(x0.grad, (g / g.numel()).bfloat16())


def test_a_second_derivative_is_that_of_the_injected_gradient():
    tensors = inputs()
    x0 = tensors[0].requires_grad_()
    scale = torch.full((), 3.0, dtype=torch.float64, requires_grad=True)
    loss = ops.dmd_loss(*tensors, sigma=0.5, cfg_scale=2.0)
    (gradient,) = torch.autograd.grad(scale * loss, x0, create_graph=True)
    (slope,) = torch.autograd.grad(gradient.sum(), scale)
    torch.testing.assert_close(3 * slope, gradient.detach().sum())


def test_empty_batch_has_zero_loss():
    tensors = inputs((0, 3, 4))
    tensors[0].requires_grad_()
    loss = ops.dmd_loss(*tensors, sigma=torch.empty(0).double(), cfg_scale=2.0)
    loss.backward()
    assert loss.item() == 0.0 and tensors[0].grad.shape == (0, 3, 4)


def test_strided_latents():
    tensors = [t.transpose(1, 2) for t in inputs((3, 5, 4))]
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    out = ops.dmd_gradient(*tensors, sigma=sigma, cfg_scale=2.0)
    assert out.grad.is_contiguous()
    torch.testing.assert_close(out.grad, formula(tensors, sigma, cfg=2.0)[0])

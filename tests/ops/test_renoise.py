"""renoise against x_t = alpha x0 + sigma noise."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast import ops

SHAPES = [(1, 1), (4, 3), (3, 4, 5), (2, 4, 7, 5), (2, 3, 4, 5, 3), (1, 2, 3, 2, 3, 2)]
SEED = torch.tensor([5, 6])


def schedule(batch: int, dtype=torch.float32):
    sigma = torch.linspace(0, 1, batch, dtype=dtype)
    return 1 - sigma, sigma


def broadcast(value, like):
    return value.reshape(-1, *[1] * (like.dim() - 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.bfloat16])
def test_given_noise(shape, x_dtype, noise_dtype):
    x0, noise = torch.randn(shape).to(x_dtype), torch.randn(shape).to(noise_dtype)
    alpha, sigma = schedule(shape[0])
    x_t = ops.renoise(x0, alpha, sigma, noise=noise)
    truth = broadcast(alpha, x0).double() * x0.double() + broadcast(sigma, x0).double() * noise.double()
    assert x_t.dtype is x_dtype
    torch.testing.assert_close(x_t.double(), truth.to(x_dtype).double(), rtol=torch.finfo(x_dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_seeded_noise_is_not_rounded_to_the_latents_dtype(dtype):
    x0 = torch.randn(3, 4, 5).to(dtype)
    alpha, sigma = schedule(3, torch.float64)
    noise = ops.normal_noise(x0.double(), SEED, offset=3)
    truth = broadcast(alpha, x0) * x0.double() + broadcast(sigma, x0) * noise
    x_t = ops.renoise(x0, alpha, sigma, seed=SEED, offset=3)
    tolerance = 1e-7 if dtype is torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(x_t.double(), truth, rtol=tolerance, atol=1e-6)


def test_numbers_serve_every_sample():
    x0, noise = torch.randn(3, 4), torch.randn(3, 4)
    expected = ops.renoise(x0, torch.full((3,), 0.75), torch.full((3,), 0.25), noise=noise)
    assert torch.equal(ops.renoise(x0, 0.75, 0.25, noise=noise), expected)
    assert torch.equal(ops.renoise(x0, torch.tensor(0.75), torch.tensor(0.25), noise=noise), expected)


def test_strided_inputs_give_contiguous_results_and_are_left_alone():
    x0 = torch.randn(2, 5, 4, 3).permute(0, 2, 3, 1)[:, ::2]
    noise = torch.randn(2, 2, 3, 5)
    before = x0.clone(), noise.clone()
    x_t = ops.renoise(x0, 0.5, 0.5, noise=noise)
    assert x_t.is_contiguous()
    torch.testing.assert_close(x_t, 0.5 * x0 + 0.5 * noise)
    assert torch.equal(x0, before[0]) and torch.equal(noise, before[1])


@pytest.mark.parametrize("seeded", [False, True])
def test_gradcheck(seeded):
    x0 = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(3, dtype=torch.float64, requires_grad=True)
    sigma = torch.rand(3, dtype=torch.float64, requires_grad=True)
    if seeded:
        assert torch.autograd.gradcheck(lambda x, a, s: ops.renoise(x, a, s, seed=SEED, offset=5), (x0, alpha, sigma))
    else:
        noise = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, a, s, n: ops.renoise(x, a, s, noise=n), (x0, alpha, sigma, noise))


def test_gradients_keep_their_dtypes_and_take_expanded_gradients():
    x0 = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    noise = torch.randn(2, 3, requires_grad=True)
    sigma = torch.tensor([0.25, 0.5], requires_grad=True)
    ops.renoise(x0, 1 - sigma, sigma, noise=noise).float().sum().backward()
    assert x0.grad.dtype is torch.bfloat16
    torch.testing.assert_close(x0.grad.float(), torch.tensor([[0.75] * 3, [0.5] * 3]))
    torch.testing.assert_close(noise.grad, torch.tensor([[0.25] * 3, [0.5] * 3]))
    torch.testing.assert_close(sigma.grad, (noise - x0.float()).detach().sum(1))


def test_backward_twice_adds_the_same_and_writes_over_nothing():
    x0 = torch.randn(2, 3, requires_grad=True)
    x_t = ops.renoise(x0, 0.5, 0.5, seed=SEED)
    incoming = torch.randn(2, 3)
    before = incoming.clone()
    first = torch.autograd.grad(x_t, x0, incoming, retain_graph=True)[0]
    second = torch.autograd.grad(x_t, x0, incoming)[0]
    assert torch.equal(first, second) and torch.equal(incoming, before)


def test_empty_batch():
    x0 = torch.empty(0, 3, requires_grad=True)
    x_t = ops.renoise(x0, torch.empty(0), torch.empty(0), seed=SEED)
    x_t.sum().backward()
    assert x_t.shape == x0.grad.shape == (0, 3)


def test_second_derivatives_are_the_formulas():
    x0 = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.renoise(x0, 0.5, 0.5, seed=SEED).square().sum(), x0, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x0)
    torch.testing.assert_close(second, torch.full_like(x0, 2 * 0.5**2))

"""dmd_gradient where g is not finite: the four policies, also for what only the output's dtype cannot hold."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast.backends.cpu import BACKEND
from tests.raw import RawFunctions

cpu, reference = RawFunctions(BACKEND), RawFunctions(None)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nan_policy", ["zero", "torch", "zero_sample", "keep"])
def test_policies_follow_the_reference_element_by_element(nan_policy, out_dtype):
    generator = torch.Generator().manual_seed(0)
    x0, x_t, fake, real = (torch.randn(4, 3, 41, generator=generator) for _ in range(4))
    fake[0, 1, 5], fake[1, 0, 40], fake[1, 2, 0] = torch.nan, torch.inf, -torch.inf
    # One half-ulp on either side of what float16 rounds to infinity, and bfloat16's.
    fake[2, 0, :4] = torch.tensor([65519.0, -65520.0, 3.3961775e38, 3.3895314e38])
    real[2, 0, :4] = 0
    args = (x0, x_t, fake, real, None, torch.ones(4), None, None, None, None)
    options = (1.0, "standard", "x0", "none", 1e-8, "add", nan_policy, out_dtype, "sum", 0.5, False)
    got, expected = cpu.dmd_gradient_fwd(*args, *options), reference.dmd_gradient_fwd(*args, *options)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=0, equal_nan=True)


def test_an_unselected_nan_does_not_get_through():
    x0, x_t, fake, real = (torch.randn(2, 3, 20) for _ in range(4))
    mask = torch.rand(2, 3, 20) > 0.3
    for tensor in (x0, x_t, fake, real):
        tensor[~mask] = torch.nan
    args = (x0, x_t, fake, real, None, torch.full((2,), 0.5), None, None, mask, None)
    options = (1.0, "standard", "flow", "per_sample", 1e-8, "add", "keep", torch.float32, "mean", 0.5, False)
    grad, norm, loss, _ = cpu.dmd_gradient_fwd(*args, *options)
    assert grad.isfinite().all() and norm.isfinite().all() and loss.isfinite()
    assert not grad[~mask].any()


@pytest.mark.parametrize("sigma", [0.0, 1e-38, 1e-30])
def test_a_tiny_normaliser_is_divided_by_in_the_formulas_order(sigma):
    # gain / norm alone would leave fp32 although g does not.
    x0 = torch.zeros(1, 16)
    fake, real = torch.full((1, 16), 3.0), torch.ones(1, 16)
    args = (x0, x0, fake, real, None, torch.tensor([sigma]), None, None, None, None)
    options = (1.0, "standard", "flow", "per_sample", 0.0, "none", "keep", torch.float32, "mean", 0.5, False)
    got, expected = cpu.dmd_gradient_fwd(*args, *options), reference.dmd_gradient_fwd(*args, *options)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0, equal_nan=True)

"""Every kernel against the reference in float64, on odd, empty, single-sample and strided shapes and mixed dtypes."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast.backends.cpu import BACKEND
from tests.cases import DTYPES, calls
from tests.raw import RawFunctions, as_tuple
from tests.truth import exact, largest_error, relative_error

cpu, reference = RawFunctions(BACKEND), RawFunctions(None)

# Relative L2 against float64. fp32: sums of up to 35,000 terms in fixed order; half types: their unit roundoff, which a
# result of a single element can reach.
CEILING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=["fp32", "bf16", "fp16", "mixed"])
def test_kernels_agree_with_the_formula_in_float64(dtype, strided):
    seen = set()
    for call in calls(dtype, strided):
        assert cpu.supports(call.name, *call.args) is None
        results = as_tuple(getattr(cpu, call.name)(*call.args))
        kept = as_tuple(getattr(reference, call.name)(*call.args))
        for index, (value, plain, truth) in enumerate(zip(results, kept, exact(call, results), strict=True)):
            where = f"{call}[{index}]"
            assert value.dtype is plain.dtype and value.shape == plain.shape, where
            assert value.is_contiguous(), where
            if not value.is_floating_point():
                assert torch.equal(value, plain), where
            elif value.numel():
                assert relative_error(value, truth) < largest_error(call, value.dtype, CEILING), where
        seen.add(call.name)
    assert seen == set(cpu.names)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_keep_their_tails_and_nan(activation):
    gate = torch.cat((torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, 1e4])))
    packed = torch.cat((torch.ones_like(gate), gate))
    truth = reference.gated_activation_fwd(packed.double(), activation, False)
    value = cpu.gated_activation_fwd(packed, activation, False)
    slope = cpu.gated_activation_bwd(torch.ones_like(gate), packed, activation, False)[gate.numel() :]
    slope_truth = reference.gated_activation_bwd(torch.ones_like(gate).double(), packed.double(), activation, False)
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(slope.double(), slope_truth[gate.numel() :], rtol=1e-6, atol=3e-7)

    odd = torch.tensor([1.0, 1.0, 1.0, torch.inf, torch.nan, -1e6])
    value = cpu.gated_activation_fwd(odd, activation, False)
    assert value[0] == torch.inf and value[1].isnan() and value[2] == 0


def test_every_bf16_and_fp16_number_is_read_and_float32_rounded_as_torch_does():
    one, every = torch.ones(()), torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    patterns = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for numbers in (every.view(torch.bfloat16), every.view(torch.float16), patterns.view(torch.float32)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            value, truth = cpu.dmd_loss_bwd(one, numbers[None], one, dtype)[0], numbers.to(dtype)
            bits = torch.int32 if dtype is torch.float32 else torch.int16
            assert torch.equal(value.isnan(), truth.isnan())
            assert torch.equal(value.view(bits)[~truth.isnan()], truth.view(bits)[~truth.isnan()])


def test_resize_matches_torch_in_float32():
    image = torch.rand(1, 3, 300, 130) * 3 - 1.5
    for size in ((224, 224), (32, 400)):
        args = (image, *size, [0.0] * 3, [1.0] * 3, True, -1.0, 1.0, False)
        difference = cpu.preprocess_reward_fwd(*args)[0] - reference.preprocess_reward_fwd(*args)[0]
        assert difference.abs().max() < 1e-6


def test_nan_stays_where_the_filter_puts_it():
    image = torch.rand(1, 1, 64, 64)
    image[0, 0, 20, 30] = torch.nan
    args = (image, 32, 32, [0.5], [0.5], True, 0.0, 1.0, True)
    (value, inside), (truth, truth_inside) = (
        cpu.preprocess_reward_fwd(*args),
        reference.preprocess_reward_fwd(*args),
    )
    assert torch.equal(value.isnan(), truth.isnan())
    assert 0 < value.isnan().sum() < 200
    assert torch.equal(inside, truth_inside)


def test_a_sample_of_scale_zero_is_not_read():
    x, base, grad = (torch.randn(2, 3, 8) for _ in range(3))
    A, B = torch.randn(8, 4), torch.randn(4, 8)
    x[1], grad[1] = torch.nan, torch.nan
    scale = torch.tensor([1.0, 0.0])
    out, low_rank = cpu.multi_lora_fwd(x, base, A, B, scale)
    assert torch.equal(out[1], base[1]) and torch.equal(low_rank[1], torch.zeros(3, 4))
    grad_x, grad_a, grad_b = cpu.multi_lora_bwd(grad, x, low_rank, A, B, scale, True, True, True)
    assert torch.equal(grad_x[1], torch.zeros(3, 8))
    alone = cpu.multi_lora_bwd(grad[:1], x[:1], low_rank[:1], A, B, scale[:1], True, True, True)
    assert torch.equal(grad_a, alone[1]) and torch.equal(grad_b, alone[2])

"""Every Triton kernel against the formula in float64: on a GPU, or in the interpreter (test_interpreter.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from dmdr_fast import ops
from dmdr_fast.ops._library import RAW
from tests.cases import SEED, Call, calls, small_calls
from tests.kernels.conftest import ONLY_ON_GPU
from tests.kernels.truth import check, moved
from tests.raw import RawFunctions, as_tuple

reference = RawFunctions(None)


@pytest.fixture
def kernels(device):
    from dmdr_fast.backends.triton import BACKEND

    return RawFunctions(BACKEND)


# The interpreter takes a minute and a half for each.
CASES = [
    pytest.param(torch.float32, False, id="fp32", marks=ONLY_ON_GPU),
    pytest.param(torch.bfloat16, True, id="bf16-strided", marks=ONLY_ON_GPU),
    pytest.param(torch.float16, False, id="fp16", marks=ONLY_ON_GPU),
    pytest.param(None, True, id="mixed-strided", marks=ONLY_ON_GPU),
]


@pytest.mark.parametrize(("dtype", "strided"), CASES)
def test_kernels_agree_with_the_formula_in_float64(kernels, device, dtype, strided):
    seen = set()
    for call in small_calls(dtype, strided):
        _run_and_check(kernels, device, call)
        seen.add(call.name)
    assert seen == set(kernels.names)


def test_the_last_call_of_each(kernels, device):
    for call in {call.name: call for call in small_calls(None, True)}.values():
        _run_and_check(kernels, device, call)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_on_every_shape_of_the_cpu_kernels(kernels, device, dtype, strided):
    if device.type == "cpu":
        pytest.skip("the interpreter would take half an hour")
    for call in calls(dtype, strided):
        _run_and_check(kernels, device, call)


def _run_and_check(kernels, device, call: Call) -> None:
    args = moved(call, device)
    kept = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    assert kernels.supports(call.name, *args) is None, str(call)
    results = as_tuple(getattr(kernels, call.name)(*args))
    check(call, results)
    for before, after in zip(kept, args, strict=True):
        if isinstance(after, Tensor):
            assert torch.equal(before.nan_to_num(), after.nan_to_num()), f"{call} wrote over an argument"


def test_opcheck(device, monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "triton")
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")
    last = {call.name: call for call in small_calls(None, True)}  # of mixed dtypes, strided
    for name, call in last.items():
        opcheck(RAW[name].operator, moved(call, device), test_utils=("test_schema", "test_faketensor"))
    assert last.keys() == RAW.keys()


def test_two_runs_are_bit_equal(kernels, device):
    if device.type == "cpu":
        pytest.skip("the interpreter runs one block after the other: nothing could differ")
    for call in small_calls(torch.float32, False):
        args = moved(call, device)
        first, second = (as_tuple(getattr(kernels, call.name)(*args)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), str(call)


@pytest.mark.parametrize("offset", [0, 3, 4096, 2**34 - 50])
def test_normals_agree_to_1e_6(kernels, device, offset):
    noise = kernels.normal_noise_fwd([5000], SEED.to(device), offset, torch.float32).cpu()
    truth = reference.normal_noise_fwd([5000], SEED, offset, torch.float64)
    assert (noise - truth).abs().max() < 1e-6


@pytest.mark.parametrize("word", [0xFFFFFFFF, 0xFFFFFE00, 0xFFFF0000, 0x80000000, 0xB504F300, 0x00000100, 0])
def test_radius_next_to_its_ends(device, word):
    # u = 1, where a logarithm of low relative accuracy loses the radius; u = 2^-24; sqrt(1/2), where the range
    # reduction jumps.
    from tests.kernels.radius import radius_kernel

    words = ((word + torch.arange(16) * 0x100) % 2**32).to(device)
    radii = torch.empty(16, device=device)
    radius_kernel[(1,)](words, radii, COUNT=16)
    u = ((words.cpu() >> 8) + 1).double() * 2.0**-24
    assert (radii.cpu() - torch.sqrt(-2 * torch.log(u))).abs().max() < 5e-7


def test_a_split_batch_draws_the_whole_ones_noise(kernels, device):
    x = torch.randn(4, 3, 11, device=device)
    alpha, sigma = torch.rand(2, 4, device=device)
    whole = kernels.renoise_fwd(x, alpha, sigma, None, SEED.to(device), 7)
    halves = [
        kernels.renoise_fwd(x[part], alpha[part], sigma[part], None, SEED.to(device), 7 + part.start * 33)
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("kind", ["flow_grpo", "dance", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_has_the_rollouts_log_probability(kernels, device, kind, dtype):
    x, v = torch.randn(2, 2, 4, 700, dtype=dtype, device=device)
    sigma, after = torch.tensor([0.9, 0.5], device=device), torch.tensor([0.7, 0.1], device=device)
    drawn, logprob, mean, _ = kernels.sde_step_fwd(x, v, sigma, after, None, SEED.to(device), 0, kind, 0.5)
    for sample in (drawn, torch.cat((drawn, drawn), -1)[..., :700]):  # as drawn, and a strided view of it
        _, replayed, same_mean, _ = kernels.sde_step_fwd(x, v, sigma, after, sample, None, 0, kind, 0.5)
        assert torch.equal(logprob, replayed) and torch.equal(mean, same_mean)


@pytest.mark.parametrize("normalizer", ["per_sample", "global", "none"])
@pytest.mark.parametrize("nan_policy", ["zero", "torch", "zero_sample", "keep"])
def test_large_samples_give_what_small_ones_give(kernels, device, monkeypatch, normalizer, nan_policy):
    # Samples of three blocks in two parts, a NaN and an infinity in one of them.
    latents = [torch.randn(2, 3, 1500, device=device) for _ in range(5)]
    latents[2][1, 0, 7], latents[2][1, 2, 30] = torch.nan, torch.inf
    mask = torch.rand(2, 1, 1500, device=device) > 0.2
    args = (
        *latents, torch.tensor([0.3, 0.8], device=device), None, None, mask, None, 3.0, "standard", "flow", normalizer,
        1e-8, "add", nan_policy, torch.float32, "mean", 0.5, False,
    )  # fmt: skip
    from dmdr_fast.backends.triton import dmd

    monkeypatch.setattr(dmd, "_LARGEST_BLOCK", 1024)
    monkeypatch.setattr(dmd, "_MOST_PARTS", 2)
    results = kernels.dmd_gradient_fwd(*args)
    expected = reference.dmd_gradient_fwd(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not dmd.counters(1 + 2, latents[0].device)().any()


def test_captured_launches_have_counters_of_their_own(device, monkeypatch):
    from dmdr_fast.backends.triton import counters as module

    device = torch.empty(0, device=device).device
    monkeypatch.setattr(module, "_spare", {device: torch.zeros(20, dtype=torch.int32, device=device)})
    eager = module.counters(3, device)()
    assert module.counters(1, device)().data_ptr() == eager.data_ptr()
    monkeypatch.setattr(module, "_captures", lambda cuda: True)
    captured = [module.counters(count, device)() for count in (3, 9, 9, 3)]  # the third finds too few left
    assert len({tensor.data_ptr() for tensor in (eager, *captured)}) == 5
    assert [tensor.numel() for tensor in captured] == [4, 12, 12, 4]
    assert not any(tensor.any() or tensor.data_ptr() % 16 for tensor in captured)


def test_a_sample_of_scale_zero_is_not_read(kernels, device):
    x, base, grad = (torch.randn(2, 70, 8, device=device) for _ in range(3))
    A, B = torch.randn(8, 4, device=device), torch.randn(4, 8, device=device)
    x[1], grad[1] = torch.nan, torch.nan
    scale = torch.tensor([1.0, 0.0], device=device)
    out, low_rank = kernels.multi_lora_fwd(x, base, A, B, scale)
    assert torch.equal(out[1], base[1]) and torch.equal(low_rank[1], torch.zeros_like(low_rank[1]))
    grads = kernels.multi_lora_bwd(grad, x, low_rank, A, B, scale, True, True, True)
    assert torch.equal(grads[0][1], torch.zeros_like(x[1]))
    assert all(part.isfinite().all() for part in grads)


def test_resize_matches_torch_in_float32(kernels, device):
    image = (torch.rand(1, 1, 90, 130, generator=torch.Generator().manual_seed(0)) * 3 - 1.5).to(device)
    for size in ((24, 40), (100, 140)):
        args = (*size, [0.0], [1.0], True, -1.0, 1.0, False)
        ours = kernels.preprocess_reward_fwd(image, *args)[0].cpu()
        assert (ours - reference.preprocess_reward_fwd(image.cpu(), *args)[0]).abs().max() < 1e-6


def test_nan_stays_where_the_filter_puts_it(kernels, device):
    image = torch.rand(1, 1, 40, 40)
    image[0, 0, 20, 30] = torch.nan
    args = (16, 16, [0.5], [0.5], True, 0.0, 1.0, True)
    value, inside = kernels.preprocess_reward_fwd(image.to(device), *args)
    truth, truth_inside = reference.preprocess_reward_fwd(image, *args)
    assert torch.equal(value.cpu().isnan(), truth.isnan()) and torch.equal(inside.cpu(), truth_inside)


def test_activations_keep_their_tails(kernels, device):
    gate = torch.cat((torch.linspace(-30, 30, 401), torch.tensor([0.0, 90.0, 1e4])))
    packed = torch.cat((torch.ones_like(gate), gate))
    for activation in ("gelu", "gelu_tanh", "silu"):
        value = kernels.gated_activation_fwd(packed.to(device), activation, False).cpu()
        slope = kernels.gated_activation_bwd(torch.ones_like(gate).to(device), packed.to(device), activation, False)
        truth = reference.gated_activation_fwd(packed.double(), activation, False)
        slope_truth = reference.gated_activation_bwd(torch.ones_like(gate).double(), packed.double(), activation, False)
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=5e-7)
        torch.testing.assert_close(slope.cpu().double(), slope_truth, rtol=1e-6, atol=5e-7)


def test_empty_tensors(kernels, device):
    empty = torch.empty(0, 3, 4, device=device)
    shared = torch.zeros(4, device=device)
    assert kernels.renoise_fwd(empty, empty[:, 0, 0], empty[:, 0, 0], empty, None, 0).shape == (0, 3, 4)
    y, mean, rstd = kernels.layer_norm_modulate_fwd(empty, shared, shared, 1e-6, torch.float32)
    grads = kernels.layer_norm_modulate_bwd(empty, empty, shared, mean, rstd, 1e-6, torch.float32, True, True)
    assert y.shape == (0, 3, 4) and torch.equal(grads[1], shared) and torch.equal(grads[2], shared)


def test_public_ops_run_on_it_forward_and_backward(device, monkeypatch):
    monkeypatch.setenv("DMDR_FAST_BACKEND", "triton")
    monkeypatch.setenv("DMDR_FAST_STRICT", "1")
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    scale = torch.randn(2, 16, device=device, requires_grad=True)
    assert ops.explain("layer_norm_modulate", x, scale, scale).backend == "triton"
    y = ops.layer_norm_modulate(x, scale, scale)
    y.square().sum().backward()
    wide, wide_scale = (tensor.detach().double().requires_grad_() for tensor in (x, scale))
    ops.layer_norm_modulate(wide, wide_scale, wide_scale).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scale.grad.double(), wide_scale.grad, rtol=1e-4, atol=1e-4)


def test_limits_are_refused_with_a_reason(kernels, device):
    row = torch.empty(1, device="meta").expand(1, 1, 70000)
    assert "at most 65536 features" in kernels.supports("layer_norm_modulate_fwd", row, row, row, 1e-6, None)
    sample, scalar = torch.empty(1, device="meta").expand(1, 2**28), torch.empty(1, device="meta")
    assert "elements" in kernels.supports("renoise_fwd", sample, scalar, scalar, sample, None, 0)

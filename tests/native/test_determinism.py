"""Results do not depend on threads, on addresses, or on a second run; inputs are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmdr_fast.backends.cpu import BACKEND
from tests.native.calls import Call, calls
from tests.raw import RawFunctions, as_tuple

cpu = RawFunctions(BACKEND)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large_calls() -> list[Call]:
    """Calls with more elements than a kernel runs on one thread."""
    sigma = torch.rand(2) * 0.5 + 0.3
    latents = [torch.randn(2, 4, 71, 173) for _ in range(5)]
    tokens = [torch.randn(2, 200, 160) for _ in range(4)]
    shift, scale, gate = (torch.randn(2, 1, 160) for _ in range(3))
    shared = torch.randn(160)
    mean, rstd = torch.randn(2, 200), torch.rand(2, 200)
    heads = [torch.randn(2, 200, 4, 64) for _ in range(4)]
    angles, weight = (torch.randn(1, 200, 64), torch.randn(1, 200, 64)), torch.randn(64)
    head_rstd = torch.rand(2, 200, 4)
    A, B = torch.randn(160, 12), torch.randn(12, 160)
    low_rank = torch.randn(2, 200, 12)
    seed = torch.tensor([1, 2])
    image, inside = torch.randn(2, 3, 150, 130), torch.randint(0, 256, (2, 3, 150, 17), dtype=torch.uint8)
    mean3, std3 = [0.5] * 3, [0.5] * 3
    dmd = (1.0, "standard", "flow", "per_sample", 1e-8, "add", "zero", torch.float32, "mean", 0.5, True)
    steps = [
        ("renoise_fwd", (latents[0], sigma, sigma, None, seed, 3)),
        ("renoise_scale_bwd", (latents[0], latents[1])),
        ("dmd_gradient_fwd", (*latents, sigma, None, None, None, None, *dmd)),
        ("sde_step_fwd", (*latents[:2], sigma, sigma * 0.9, None, seed, 0, "flow_grpo", 0.7)),
        ("multi_lora_fwd", (tokens[0], tokens[1], A, B, sigma)),
        ("multi_lora_bwd", (tokens[0], tokens[1], low_rank, A, B, sigma, True, True, True)),
        ("multi_lora_fwd", (*_bfloat16(tokens[0], tokens[1], A, B), sigma)),
        ("multi_lora_bwd", (*_bfloat16(*tokens[:2]), low_rank, *_bfloat16(A, B), sigma, True, True, True)),
        ("layer_norm_modulate_fwd", (tokens[0], shift, scale, 1e-6, torch.float32)),
        ("layer_norm_modulate_bwd", (tokens[0], tokens[1], scale, mean, rstd, 1e-6, torch.float32, True, True)),
        ("layer_norm_modulate_bwd", (tokens[0], tokens[1], shared, mean, rstd, 1e-6, torch.float32, True, True)),
        (
            "gated_residual_layer_norm_modulate_bwd",
            (*tokens, gate, scale, mean, rstd, 1e-6, torch.float32, True, True, True),
        ),
        ("rms_norm_scale_fwd", (tokens[0], shared, scale, 1e-6, torch.float32)),
        ("gated_residual_rms_norm_fwd", (*tokens[:2], gate, shared, 1e-6)),
        ("rms_norm_scale_bwd", (tokens[0], tokens[1], shared, scale, rstd, 1e-6, True, True, True)),
        ("qk_norm_rope_bwd", (*heads, weight, weight, *angles, head_rstd, head_rstd, 1e-6, True, True)),
        ("preprocess_reward_fwd", (image, 96, 112, mean3, std3, True, -1.0, 1.0, True)),
        (
            "preprocess_reward_bwd",
            (torch.randn(2, 3, 96, 112), inside, 130, std3, True, -1.0, 1.0, torch.float32),
        ),
    ]
    return [Call(name, "large", args) for name, args in steps]


def _bfloat16(*tensors: Tensor) -> list[Tensor]:
    return [tensor.bfloat16() for tensor in tensors]


def test_thread_counts_give_the_same_bits(threads):
    for call in large_calls():
        threads(1)
        alone = as_tuple(getattr(cpu, call.name)(*call.args))
        for count in (2, 3, 7):
            threads(count)
            again = as_tuple(getattr(cpu, call.name)(*call.args))
            assert all(map(torch.equal, alone, again)), f"{call} on {count} threads"


def test_addresses_do_not_matter():
    for call in large_calls():
        shifted = tuple(_shifted(arg) if isinstance(arg, Tensor) else arg for arg in call.args)
        here, there = (as_tuple(getattr(cpu, call.name)(*args)) for args in (call.args, shifted))
        assert all(map(torch.equal, here, there)), str(call)


def _shifted(tensor: Tensor) -> Tensor:
    """A contiguous copy that starts one element past an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    copy = room[1:].view(tensor.shape)
    return copy.copy_(tensor)


def test_inputs_are_left_alone():
    for call in calls(torch.bfloat16, strided=True):
        before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in call.args]
        getattr(cpu, call.name)(*call.args)
        for arg, kept in zip(call.args, before, strict=True):
            if isinstance(arg, Tensor):
                assert torch.equal(arg.nan_to_num(), kept.nan_to_num()), str(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaying_a_drawn_step_gives_its_bits(dtype):
    x, v = (torch.randn(3, 5, 7, 11).to(dtype) for _ in range(2))
    sigma = torch.tensor([1.0, 0.8, 0.4])
    for kind, eta in (("flow_grpo", 0.7), ("dance", 0.3), ("cps", 0.5)):
        step = (x, v, sigma, sigma * 0.7)
        drawn, *first = cpu.sde_step_fwd(*step, None, torch.tensor([3, 4]), 2, kind, eta)
        _, *again = cpu.sde_step_fwd(*step, drawn, None, 0, kind, eta)
        assert all(map(torch.equal, first, again))


def test_the_default_device_does_not_move_results():
    call_list = list(calls(torch.float32, strided=False))
    with torch.device("meta"):
        for call in call_list:
            assert all(result.device.type == "cpu" for result in as_tuple(getattr(cpu, call.name)(*call.args)))

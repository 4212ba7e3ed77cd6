"""Results do not depend on threads, on addresses, or on a second run; inputs are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmdr_fast.backends.cpu import BACKEND
from tests.cases import calls, large_calls
from tests.raw import RawFunctions, as_tuple

cpu = RawFunctions(BACKEND)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


def test_a_samples_gradient_does_not_depend_on_the_batch():
    (call,) = (call for call in large_calls() if call.label == "larger")
    grad, norm, *_ = cpu.dmd_gradient_fwd(*call.args)
    for index in range(len(norm)):
        parts = (arg[index : index + 1] if isinstance(arg, Tensor) else arg for arg in call.args)
        alone, norm_alone, *_ = cpu.dmd_gradient_fwd(*parts)
        assert torch.equal(alone[0], grad[index]) and torch.equal(norm_alone[0], norm[index])


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

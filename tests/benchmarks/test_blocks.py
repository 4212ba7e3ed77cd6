"""The gate of bench_blocks.py: fused blocks are the model's own, other blocks are stopped."""

from copy import deepcopy

import pytest
import torch

from benchmarks import bench_blocks
from benchmarks.gate import GateFailure
from dmdr_fast.patch import patch


def sit():
    return bench_blocks.SiTStack(64, head=32), ((2, 16, 64), (2, 64))


def sd3():
    pytest.importorskip("diffusers")
    return bench_blocks.SD3Stack(2, head=32), ((2, 16, 64), (2, 7, 64), (2, 64))


@pytest.mark.parametrize("made", [sit, sd3])
def test_fused_blocks_pass_the_gate_and_others_do_not(made):
    torch.manual_seed(0)
    eager, shapes = made()
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    fused = deepcopy(eager)
    patch(fused)
    assert {type(block) for block in fused.blocks} != {type(block) for block in eager.blocks}
    errors = bench_blocks._check(fused, eager, inputs, torch.float32, "fused")
    assert all(0 <= error.fused <= error.bound for error in errors.values())
    assert len(errors) == 4 and errors["grads of the weights"].fused > 0
    with torch.no_grad():
        next(fused.blocks[1].parameters()).mul_(1.01)
    with pytest.raises(GateFailure, match="fused blocks differ from the model's own"):
        bench_blocks._check(fused, eager, inputs, torch.float32, "fused")

"""Derivatives of patched networks beyond the first in reverse mode: jvp, and gradients of gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dmdr_fast.patch
from tests.patch.families import cast, leaves, randomised, run

# Relative L2 errors. Of differences: the step squared times a third derivative, and what diffusers' layers round to
# float32 on the way, 6e-8 over the step.
STEP, OF_DIFFERENCES, OF_ROUNDING = 1e-3, 5e-5, 1e-6


@pytest.fixture
def patched(family):
    """(the patched float64 network as a function of its inputs, the inputs, the network as it was)."""
    model = randomised(family.build(1)).double().requires_grad_(False)
    plain = copy.deepcopy(model)
    dmdr_fast.patch(model, family.ops)
    inputs = cast(family.inputs(), torch.float64)
    points = [leaf.detach() for leaf in leaves(inputs)]

    def of(network):
        def function(*tensors: Tensor) -> Tensor:
            each = iter(tensors)
            named = {k: [next(each) for _ in v] if isinstance(v, list) else next(each) for k, v in inputs.items()}
            return run(network, family, named)

        return function

    with sdpa_kernel(SDPBackend.MATH):  # the kernel that has a forward derivative
        yield of(model), points, of(plain)


def test_jvp_against_finite_differences(patched):
    function, points, plain = patched
    directions = [torch.randn_like(point) for point in points]
    value, slope = torch.func.jvp(function, tuple(points), tuple(directions))
    assert error(value, function(*points)) < OF_ROUNDING
    ahead, behind = (
        plain(*(point + by * direction for point, direction in zip(points, directions, strict=True)))
        for by in (STEP, -STEP)
    )
    assert error(slope, (ahead - behind) / (2 * STEP)) < OF_DIFFERENCES
    assert error(slope, torch.func.jvp(plain, tuple(points), tuple(directions))[1]) < OF_ROUNDING


def test_gradients_of_gradients(patched):
    """A gradient penalty: d/dx |d out / dx|^2, of the patched network and of the network as it was."""

    def penalty(function) -> list[Tensor]:
        points = [point.clone().requires_grad_() for point in patched[1]]
        grads = torch.autograd.grad(function(*points).square().sum(), points, create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in grads), points))

    for fused, plain in zip(penalty(patched[0]), penalty(patched[2]), strict=True):
        assert error(fused, plain) < OF_ROUNDING


def error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())

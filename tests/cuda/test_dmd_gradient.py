"""The ways of dmd_gradient: one pass in clusters of every size, two launches, and what must be the same in all."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dmdr_fast.backends.native import dmd
from tests.raw import RawFunctions
from tests.tiers import sampled

reference = RawFunctions(None)

OPTIONS = {
    "sigma": None, "alpha": None, "cfg_tensor": None, "mask": None, "weight": None, "cfg_scale": 3.5,
    "cfg_mode": "standard", "prediction": "flow", "normalizer": "per_sample", "eps": 1e-8, "eps_mode": "add",
    "nan_policy": "zero", "out_dtype": torch.bfloat16, "reduction": "mean", "factor": 0.5,
    "scaled": False,
}  # fmt: skip


def arguments(latents: list[Tensor | None], **changes: object) -> tuple:
    options = {"sigma": torch.linspace(0.2, 0.8, latents[0].shape[0]), **changes}
    return (*latents, *(OPTIONS | options).values())


def latents(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(5)]


def double(args: tuple) -> tuple:
    wide = [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    return tuple(torch.float64 if isinstance(arg, torch.dtype) else arg for arg in wide)


def check(results: tuple[Tensor, ...], args: tuple, ceiling: float = 2**-8) -> None:
    """Results against float64: grad in relative L2, the scalars to float32's rounding."""
    grad, norm, loss, loss_scale = reference.dmd_gradient_fwd(*double(args))
    assert ((results[0].double() - grad).norm() / grad.norm()) < ceiling
    for value, truth in zip(results[1:], (norm, loss, loss_scale), strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=3e-6, atol=0)


# Size, largest cluster that the device allows, and the clusters of the launches.
WAYS = [
    ((300, 64), 16, [1]),  # many samples: a block each
    ((2, 16384), 16, [4]),  # few: cut finer, to slices of 4096 elements
    ((1, 65536), 16, [8]),
    ((1, 140000), 16, [16]),  # the slices of eight blocks would be large
    ((1, 140000), 8, [8]),
    ((1, 140000), 1, [1, 1]),  # no clusters: beyond one block there are two launches
    ((1, 16384), 1, [1]),
    ((1, 450000), 16, [1, 1]),  # beyond sixteen blocks
]


@pytest.mark.parametrize(("shape", "most_cluster", "clusters"), WAYS)
def test_sizes_take_their_way(emulated, shape, most_cluster, clusters):
    args = arguments(latents(*shape))
    emulated.configure(most_cluster)
    results = emulated("dmd_gradient_fwd", *args)
    assert [launch.cluster for launch in emulated.launches()] == clusters
    check(results, args)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"normalizer": "none"}, 1),
        ({"normalizer": "none", "nan_policy": "zero_sample"}, 1),
        ({"normalizer": "global"}, 2),
        ({"normalizer": "global", "nan_policy": "zero_sample"}, 2),
    ],
)
def test_normalizers_take_one_launch_or_two(emulated, changes, count):
    args = arguments(latents(3, 4, 40), **changes)
    results = emulated("dmd_gradient_fwd", *args)
    assert len(emulated.launches()) == count
    check(results, args)


@pytest.mark.parametrize("shape", [(9, 64), (2, 16384), (1, 140000), (3, 500, 33)])
@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float32, torch.float16]))
def test_every_way_agrees_with_float64(kernels, shape, dtype):
    ceiling = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for normalizer, uncond in itertools.product(("per_sample", "global", "none"), (True, False)):
        given = latents(*shape, dtype=dtype)
        args = arguments(given if uncond else [*given[:4], None], normalizer=normalizer, out_dtype=dtype)
        check(kernels("dmd_gradient_fwd", *args), args, ceiling)


@pytest.mark.parametrize("shape", [(9, 64), (1, 140000)])
@pytest.mark.parametrize(("normalizer", "reduction"), [("per_sample", "mean"), ("none", "sum"), ("global", "mean")])
def test_every_way_writes_the_loss_s_gradient(kernels, shape, normalizer, reduction):
    changes = {"normalizer": normalizer, "reduction": reduction, "factor": 0.75, "scaled": True}
    args = arguments(latents(*shape, dtype=torch.float32), out_dtype=torch.float32, **changes)
    results = kernels("dmd_gradient_fwd", *args)
    check(results, args, 2e-6)
    assert results[3] == 1


@pytest.mark.parametrize("most_cluster", [1, 8, 16])
def test_threads_may_run_in_any_order(emulated, most_cluster):
    args = arguments(latents(2, 40000))
    emulated.configure(most_cluster)
    forward = emulated("dmd_gradient_fwd", *args)
    emulated.configure(most_cluster, reversed_order=True)
    reverse = emulated("dmd_gradient_fwd", *args)
    assert all(torch.equal(a, b) for a, b in zip(forward, reverse, strict=True))


def test_the_ticket_is_zero_again(emulated, monkeypatch):
    args = arguments(latents(2, 16384))
    monkeypatch.setattr(dmd, "_counting", {})
    first = emulated("dmd_gradient_fwd", *args)
    (space,) = dmd._counting.values()
    assert space[0].view(torch.int64) == 0
    assert all(torch.equal(a, b) for a, b in zip(first, emulated("dmd_gradient_fwd", *args), strict=True))


def poisoned(shape: tuple[int, ...]) -> list[Tensor | None]:
    """A NaN and infinities in sample 0, a value that overflows float16 in the last sample."""
    given = [torch.randn(shape) for _ in range(4)]
    fake = given[2].view(shape[0], -1)
    fake[0, 3], fake[0, 4], fake[0, 5], fake[-1, 1] = torch.nan, torch.inf, -torch.inf, 1e6
    return [*given, None]


@pytest.mark.parametrize(("samples", "size"), sampled([(3, 7), (2, 4096), (2, 40000)], 2))
@pytest.mark.parametrize("normalizer", ["per_sample", "global", "none"])
@pytest.mark.parametrize("policy", ["zero", "torch", "zero_sample", "keep"])
def test_nan_policies_are_exact(kernels, samples, size, normalizer, policy):
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = arguments(poisoned((samples, size)), normalizer=normalizer, nan_policy=policy, out_dtype=out_dtype)
        grad, _, loss, _ = kernels("dmd_gradient_fwd", *args)
        truth, _, true_loss, _ = reference.dmd_gradient_fwd(*args)
        assert torch.equal(grad.isnan(), truth.isnan()) and torch.equal(grad.isinf(), truth.isinf())
        assert torch.equal(grad == 0, truth == 0)
        torch.testing.assert_close(grad, truth, equal_nan=True)
        if policy != "keep":
            torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [65503.0, 65519.0, 65520.0, 70000.0])
def test_zero_sample_sees_the_rounded_value(kernels, value):
    zero, fake = torch.zeros(2, 64), torch.zeros(2, 64)
    fake[0, 9], fake[1, 5] = value, 3.0
    changes = {"prediction": "x0", "normalizer": "none", "nan_policy": "zero_sample", "out_dtype": torch.float16}
    args = arguments([zero, zero, fake, zero, None], **changes)
    grad = kernels("dmd_gradient_fwd", *args)[0]
    assert torch.equal(grad, reference.dmd_gradient_fwd(*args)[0])
    assert (grad[0].abs().max() == 0) == (value >= 65520)


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("normalizer", ["per_sample", "global", "none"])
def test_masks_at_any_address(kernels, normalizer, offset):
    bytes_before = torch.zeros(offset, dtype=torch.bool)
    mask = torch.cat((bytes_before, torch.rand(2 * 4096) < 0.6))[offset:].view(2, 4096)
    args = arguments(latents(2, 4096), mask=mask, normalizer=normalizer)
    results = kernels("dmd_gradient_fwd", *args)
    check(results, args)
    assert not results[0][~mask].any()


def test_tiny_and_huge_normalizers_divide_in_the_formula_s_order(kernels):
    # norm about 1e-42: one folded factor would be infinite, and 0 times it NaN.
    x0 = torch.zeros(2, 64)
    fake, real = torch.zeros(2, 64), torch.full((2, 64), 1e-42)
    fake[:, :32] = 1e-42
    args = arguments(
        [x0, x0, fake, real, None], prediction="x0", eps_mode="none", nan_policy="keep", out_dtype=torch.float32
    )
    grad = kernels("dmd_gradient_fwd", *args)[0]
    assert torch.equal(grad, reference.dmd_gradient_fwd(*args)[0])

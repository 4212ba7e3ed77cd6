"""What the CUDA backend says it cannot do, and that it can do the rest."""

from __future__ import annotations

import pytest
import torch

from dmdr_fast import backends
from tests.raw import RawFunctions

reference = RawFunctions(None)


def image_call(size_in: int, size_out: int, channels: int = 3) -> tuple:
    ones = [1.0] * channels
    image = torch.empty(1, channels, size_in, size_in, device="meta")
    return image, size_out, size_out, ones, ones, True, -1.0, 1.0, True


@pytest.mark.parametrize(("size_in", "size_out"), [(256, 224), (1024, 224), (4096, 224), (16384, 224), (224, 1024)])
def test_usual_resizes_are_supported(emulated, size_in, size_out):
    assert emulated.functions.supports("preprocess_reward_fwd", *image_call(size_in, size_out)) is None


def test_a_resize_beyond_shared_memory_is_refused_with_its_sizes(emulated):
    why = emulated.functions.supports("preprocess_reward_fwd", *image_call(16, 1024))
    assert why == "the filters from [16, 16] to [1024, 1024] do not fit into a block's shared memory"
    grad, inside = torch.empty(1, 3, 1024, 1024, device="meta"), torch.empty(1, 3, 16, 2, device="meta")
    args = (grad, inside, 16, [1.0] * 3, True, -1.0, 1.0, torch.float32)
    assert emulated.functions.supports("preprocess_reward_bwd", *args) == why


def test_the_largest_supported_enlargement_runs(emulated):
    image = torch.randn(1, 1, 32, 32)
    sizes = [
        size
        for size in range(64, 600, 8)
        if emulated.functions.supports("preprocess_reward_fwd", *image_call(32, size, 1)) is None
    ]
    out, inside = emulated("preprocess_reward_fwd", image, sizes[-1], sizes[-1], [0.0], [1.0], True, -1.0, 1.0, True)
    assert out.shape == (1, 1, sizes[-1], sizes[-1])
    emulated("preprocess_reward_bwd", out, inside, 32, [1.0], True, -1.0, 1.0, torch.float32)


def test_many_channels_are_refused(emulated):
    why = emulated.functions.supports("preprocess_reward_fwd", *image_call(64, 32, channels=40))
    assert why == "it takes up to 32 channels, the image has 40"


@pytest.mark.parametrize(("features", "refused"), [(8192, False), (8193, True)])
def test_rows_are_limited_by_registers(emulated, features, refused):
    x, scale, mean = (torch.empty(1, n, features, device="meta") for n in (4, 1, 4))
    calls = {
        "layer_norm_modulate_fwd": (x, scale, scale, 1e-6, torch.float32),
        "layer_norm_modulate_bwd": (x, x, scale, mean[..., 0], mean[..., 0], 1e-6, torch.float32, True, True),
    }
    for name, args in calls.items():
        why = emulated.functions.supports(name, *args)
        assert (why is not None) == refused
        if refused:
            assert why == "it takes rows of at most 8192 features, these have 8193"


@pytest.mark.parametrize("features", [1, 31, 1024, 1032, 2048, 2056, 4096, 4104, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_width_of_a_row(emulated, features, dtype):
    x, grad = (torch.randn(2, 3, features).to(dtype) for _ in range(2))
    shift, scale = (torch.randn(2, 1, features).to(dtype) for _ in range(2))
    ceiling = 2e-6 if dtype is torch.float32 else 2**-8
    y, mean, rstd = emulated("layer_norm_modulate_fwd", x, shift, scale, 1e-6, dtype)
    truth = reference.layer_norm_modulate_fwd(x.double(), shift.double(), scale.double(), 1e-6, torch.float64)
    results = [y]
    truths = [truth[0]]
    results += emulated("layer_norm_modulate_bwd", grad, x, scale, mean, rstd, 1e-6, dtype, True, True)
    wide = [value.double() for value in (grad, x, scale, mean, rstd)]
    truths += reference.layer_norm_modulate_bwd(*wide, 1e-6, torch.float64, True, True)
    for value, exact in zip(results, truths, strict=True):
        assert (value.double() - exact).norm() <= ceiling * exact.norm() + 1e-12


def test_an_old_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = backends.too_old.__wrapped__(torch.device("cuda", 0))
    assert why == "its kernels need compute capability 8.0 or later, this device has 7.5"

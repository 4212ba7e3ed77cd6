"""The weights of the bicubic resize against PyTorch's, and the bounds by which kernels size their tables."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from tests.cuda import building
from tests.raw import RawFunctions

reference = RawFunctions(None)

SIZES = [
    (64, 56),
    (256, 224),
    (1024, 224),
    (1300, 224),
    (37, 13),
    (16, 40),
    (5, 5),
    (9, 1),
    (1, 4),
    (300, 3),
    (224, 518),
]


@pytest.fixture(scope="module")
def functions(request) -> ctypes.CDLL:
    return ctypes.CDLL(str(building.device_functions(request.config)))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def windows(functions, size_in: int, size_out: int, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    first, end = np.zeros(size_out, np.int64), np.zeros(size_out, np.int64)
    sizes = [ctypes.c_int64(value) for value in (size_in, size_out, antialias)]
    functions.resize_windows(*sizes, pointer(first), pointer(end))
    return first, end


@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
@pytest.mark.parametrize("antialias", [True, False])
def test_weights_are_pytorch_s(functions, size_in, size_out, antialias):
    matrix = np.zeros((size_out, size_in), np.float32)
    sizes = [ctypes.c_int64(value) for value in (size_in, size_out, antialias)]
    functions.resize_matrix(*sizes, pointer(matrix))
    image = torch.eye(size_in)[None, None]
    args = ([0.0], [1.0], antialias, 0.0, 1.0, False)
    expected = reference.preprocess_reward_fwd(image, size_out, size_in, *args)[0][0, 0].numpy()
    # Without antialiasing PyTorch fuses the multiply-add of the source position on some machines: an ulp of it.
    tolerance = 1e-6 if antialias else 1e-6 + 2 * np.spacing(np.float32(size_in))
    assert np.abs(matrix - expected).max() < tolerance


def test_tables_hold_what_the_windows_need(functions):
    draw = random.Random(0)
    pairs = SIZES + [(draw.randint(1, 3000), draw.randint(1, 1200)) for _ in range(400)]
    pairs += [(n, n - d) for n in (64, 255, 1000, 2999) for d in (0, 1, 2)]
    for size_in, size_out in pairs:
        for antialias in (True, False):
            check_bounds(functions, size_in, size_out, antialias)


def check_bounds(functions, size_in: int, size_out: int, antialias: bool) -> None:
    first, end = windows(functions, size_in, size_out, antialias)
    where = f"{size_in} to {size_out}, antialias {antialias}"
    assert (np.diff(first) >= 0).all() and (np.diff(end) >= 0).all() and (end > first).all(), where
    for outputs, inputs in ((1, 1), (8, 8), (32, 64), (200, 1024)):
        bounds = np.zeros(3, np.int64)
        numbers = [ctypes.c_int64(value) for value in (size_in, size_out, antialias, outputs, inputs)]
        functions.resize_bounds(*numbers, pointer(bounds))
        taps, most_inputs, most_outputs = bounds
        assert (end - first).max() <= taps, where
        last = np.minimum(np.arange(size_out) + outputs, size_out) - 1
        assert (end[last] - first).max() <= most_inputs, where
        # Outputs that cover one of the inputs [at, at + inputs): those that end behind `at` and begin before the last.
        at = np.arange(0, size_in, max(1, size_in // 97))
        covering = np.searchsorted(first, at + inputs, "left") - np.searchsorted(end, at, "right")
        assert covering.max() <= most_outputs, where
    if antialias and size_in >= size_out:
        # The streaming kernel keeps five sums, and its last image row completes at most three.
        rows = np.arange(size_in)
        open_filters = np.searchsorted(first, rows, "right") - np.searchsorted(end, rows, "right")
        assert open_filters.max() <= 5, where
        completed = np.bincount(end, minlength=size_in + 1)
        assert completed[:-1].max(initial=0) <= 1 and completed[-1] <= 3, where

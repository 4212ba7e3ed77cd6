"""The device that kernel tests run on: a GPU, or the CPU where the process is Triton's interpreter."""

import functools
import os

import pytest
import torch

from dmdr_fast.backends import plans
from tests.interpreted import make_repeatable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    make_repeatable()
ONLY_ON_GPU = pytest.mark.thorough if INTERPRETED else ()  # but for `make test-all`
_ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu"] if INTERPRETED else [_ON_GPU])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; test_interpreter.py runs this test in Triton's interpreter")
    pytest.importorskip("triton")
    return torch.device(request.param)


def _poisoned(device: str, shape: tuple, strides: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """What a kernel does not write shows: fresh memory is NaN, or the largest integer."""
    for device_type in plans.EMPTY:
        monkeypatch.setitem(plans.EMPTY, device_type, functools.partial(_poisoned, device_type))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])

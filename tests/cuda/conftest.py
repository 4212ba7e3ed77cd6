"""The CUDA backend on a library that runs its kernels on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dmdr_fast.backends import plans
from dmdr_fast.backends.native import Library
from tests.cuda import building
from tests.cuda.fences import fenced, fenced_empty_strided
from tests.raw import RawFunctions, as_tuple


class Kernels:
    """The raw functions of a CUDA library on tensors of one device.

    Attributes:
        library: the library.
        functions: what it has, see :class:`RawFunctions`.
        device: where the tensors of a call go.
        emulated: they run on the CPU.
    """

    def __init__(self, library: Library, device: str, emulated: bool) -> None:
        self.library, self.functions = library, RawFunctions(library.backend())
        self.device, self.emulated = device, emulated

    def __call__(self, name: str, *args: object) -> tuple[Tensor, ...]:
        """The results on the CPU; the arguments come from there and are not written."""
        placed = [self.place(arg) if isinstance(arg, Tensor) else arg for arg in args]
        results = as_tuple(self.functions(name, *placed))
        for arg, there in zip(args, placed, strict=True):
            if isinstance(arg, Tensor):
                torch.testing.assert_close(there.cpu(), arg, rtol=0, atol=0, equal_nan=True)
        return tuple(result.cpu() for result in results)

    def place(self, tensor: Tensor) -> Tensor:
        """A copy on the device with the same strides."""
        if self.emulated:
            return fenced(tensor)
        storage = tensor.untyped_storage().to(self.device)
        copy = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def configure(self, most_cluster: int = 16, reversed_order: bool = False) -> None:
        """Emulated only: the largest cluster that a launch may ask for, and the order in which threads run."""
        self.library.functions.emulation_configure(ctypes.c_int64(most_cluster), ctypes.c_int64(reversed_order))

    def launches(self) -> list[Launch]:
        """Emulated only: the launches of the one call since the last ``configure``, without its repetition by plan."""
        library = self.library.functions
        library.emulation_launches.restype = ctypes.c_int64
        launches = []
        for index in range(library.emulation_launches()):
            numbers = (ctypes.c_int64 * 4)()
            library.emulation_launch(ctypes.c_int64(index), numbers)
            launches.append(Launch(*numbers))
        first, again = launches[: len(launches) // 2], launches[len(launches) // 2 :]
        assert first == again
        return first


class Launch(NamedTuple):
    """How a kernel was launched."""

    blocks: int
    threads: int
    cluster: int
    shared: int


@pytest.fixture(scope="session")
def emulated_library(request) -> Library:
    return Library(building.emulated_library(request.config), "cuda")


@pytest.fixture
def emulated(emulated_library, monkeypatch) -> Kernels:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(plans.EMPTY, "cpu", fenced_empty_strided)
    kernels = Kernels(emulated_library, "cpu", True)
    kernels.configure()
    return kernels


@pytest.fixture
def on_gpu() -> Kernels:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from dmdr_fast.backends.cuda import LIBRARY

    return Kernels(LIBRARY, "cuda", False)


@pytest.fixture(params=["emulated", pytest.param("on_gpu", marks=pytest.mark.gpu)])
def kernels(request) -> Kernels:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)

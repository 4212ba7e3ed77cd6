"""The CUDA backend on a library that runs its kernels on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dmdr_fast.backends import native
from tests.cuda import building
from tests.cuda.fences import fenced, fenced_new_empty

_PACKAGE = "dmdr_fast.backends.cuda"


class Kernels:
    """The raw functions of the CUDA backend on tensors of one device.

    Attributes:
        backend: the module ``dmdr_fast.backends.cuda``.
        device: where the tensors of a call go.
        emulated: they run on the CPU.
    """

    def __init__(self, backend: ModuleType, device: str, emulated: bool) -> None:
        self.backend, self.device, self.emulated = backend, device, emulated

    def __call__(self, name: str, *args: object) -> tuple[Tensor, ...]:
        """The results on the CPU; the arguments come from there and are not written."""
        placed = [self.place(arg) if isinstance(arg, Tensor) else arg for arg in args]
        results = getattr(self.backend, name)(*placed)
        for arg, there in zip(args, placed, strict=True):
            if isinstance(arg, Tensor):
                torch.testing.assert_close(there.cpu(), arg, rtol=0, atol=0, equal_nan=True)
        results = results if isinstance(results, tuple) else (results,)
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
        self.backend.library.LIBRARY.emulation_configure(ctypes.c_int64(most_cluster), ctypes.c_int64(reversed_order))

    def launches(self) -> list[Launch]:
        """Emulated only: the launches since the last ``configure``."""
        library = self.backend.library.LIBRARY
        library.emulation_launches.restype = ctypes.c_int64
        launches = []
        for index in range(library.emulation_launches()):
            numbers = (ctypes.c_int64 * 4)()
            library.emulation_launch(ctypes.c_int64(index), numbers)
            launches.append(Launch(*numbers))
        return launches


class Launch(NamedTuple):
    """How a kernel was launched."""

    blocks: int
    threads: int
    cluster: int
    shared: int


def load_backend(path: Path) -> ModuleType:
    """``dmdr_fast.backends.cuda`` on the library at ``path``, apart from the one that the process may have."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(_PACKAGE)}
    found = native.library_path
    native.library_path = lambda stem: path
    try:
        return importlib.import_module(_PACKAGE)
    finally:
        native.library_path = found
        for name in [name for name in sys.modules if name.startswith(_PACKAGE)]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(scope="session")
def emulated_backend(request) -> ModuleType:
    return load_backend(building.emulated_library(request.config))


@pytest.fixture
def emulated(emulated_backend, monkeypatch) -> Kernels:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.Tensor, "new_empty", fenced_new_empty)
    kernels = Kernels(emulated_backend, "cpu", True)
    kernels.configure()
    return kernels


@pytest.fixture
def on_gpu() -> Kernels:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return Kernels(importlib.import_module(_PACKAGE), "cuda", False)


@pytest.fixture(params=["emulated", pytest.param("on_gpu", marks=pytest.mark.gpu)])
def kernels(request) -> Kernels:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)

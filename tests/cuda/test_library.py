"""libdmdr_cuda as nvcc builds it: it loads and answers on a machine without a driver, and keeps to itself."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmdr_fast.backends.native import Library, NativeError, abi
from dmdr_fast.backends.native.library import Calls
from dmdr_fast.backends.views import Strided
from tests.cuda import building

KERNELS = [
    *[f"dmdr_renoise_{way}" for way in ("fwd", "bwd", "scale_bwd")],
    *[
        f"dmdr_{op}_{way}"
        for op in ("dmd_gradient", "layer_norm_modulate", "preprocess_reward")
        for way in ("fwd", "bwd")
    ],
]
QUERIES = ["dmdr_abi_version", "dmdr_error_string"]
WORKSPACES = [f"dmdr_{op}_workspace" for op in ("dmd_gradient", "modulation", "preprocess_reward")]


@pytest.fixture(scope="module")
def path(request) -> Path:
    return building.cuda_library(request.config)


@pytest.fixture
def library(path) -> ctypes.CDLL:
    return Library(path, "cuda").functions


def structs() -> dict[str, str]:
    """Function and argument struct of every kernel that the header declares."""
    return dict(re.findall(r"DMDR_EXPORT int (dmdr_\w+)\(const (dmdr_\w+_args) \*", building.ABI.read_text()))


def test_exports_the_abi_and_nothing_else(path):
    text = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[-1] for line in text.splitlines()) == sorted(KERNELS + QUERIES + WORKSPACES)


def test_needs_no_cuda_library(path):
    text = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in text.replace(str(path), "") and "not found" not in text


def test_is_of_this_abi(library):
    assert library.dmdr_abi_version() == abi.VERSION


def test_statuses_and_cuda_errors_have_sentences(library):
    texts = {library.dmdr_error_string(status).decode() for status in range(6)}
    assert len(texts) == 6 and all(texts)
    assert library.dmdr_error_string(1000 + 2) == b"out of memory"


@pytest.mark.parametrize("name", KERNELS)
def test_another_struct_size_is_refused(library, name):
    entry = getattr(library, name)
    entry.restype, entry.argtypes = ctypes.c_int, (ctypes.c_char_p, ctypes.c_void_p)
    size = len(abi.packed(structs()[name], {})[0])
    for wrong in (size - 8, size + 8, 0):
        assert entry(wrong.to_bytes(8, "little") + bytes(size), None) == 1
    assert entry(None, None) == 1


def test_wrong_modes_and_dtypes_are_refused_before_the_device_is_asked(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    x = torch.zeros(1, 8)
    run, view = Calls(Library(path, "cuda"), (x,)), Strided(x, (8,))
    fields = {"shape": (1, 1, 1, 1, 1, 8), "gather": 9, **dict.fromkeys(("x", "scale", "grad_y", "grad_x"), view)}
    with pytest.raises(NativeError, match="a size, mode or pointer is outside"):
        run.call("layer_norm_modulate_bwd", "dmdr_layer_norm_modulate_args", fields)
    monkeypatch.setitem(abi.DTYPE_CODE, torch.float32, 7)
    with pytest.raises(NativeError, match="dtype is none of float32, bfloat16 and float16"):
        run.call("renoise_bwd", "dmdr_renoise_args", {"shape": fields["shape"], "x0": view, "out": view, "alpha": x})


def test_without_a_driver_a_call_says_so(path):
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    # In a process of its own: the CUDA runtime remembers that it found none.
    code = f"""
from pathlib import Path
from types import SimpleNamespace
import torch
from dmdr_fast.backends.native import Library, NativeError
from dmdr_fast.backends.native.library import Calls
from dmdr_fast.backends.views import Strided
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
x = torch.zeros(1, 8)
view, run = Strided(x, (8,)), Calls(Library(Path({str(path)!r}), "cuda"), (x,))
try:
    run.call("renoise_bwd", "dmdr_renoise_args", dict(shape=(1, 1, 1, 1, 1, 8), x0=view, out=view, alpha=x))
except NativeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=building.ROOT)
    assert re.search(r"dmdr_renoise_bwd: (CUDA driver version is insufficient|no CUDA-capable device)", run.stdout), run


@pytest.mark.parametrize("architectures", ["native", "90a", "8.0"])
def test_architectures_are_numbers(tmp_path, architectures):
    if building.nvcc_version() is None:
        pytest.skip("needs nvcc on PATH")
    options = ["-DDMDR_CUDA=ON", f"-DDMDR_CUDA_ARCHITECTURES={architectures}"]
    run = subprocess.run(["cmake", "-S", building.ROOT, "-B", tmp_path, *options], capture_output=True, text=True)
    assert run.returncode != 0
    assert f"such as 80;90, got '{architectures}'" in " ".join(run.stderr.split())

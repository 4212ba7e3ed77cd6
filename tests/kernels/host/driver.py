"""The host's share of a call on a GPU, on a machine without one: Triton's JIT, binder and launcher over driver.c.

Kernels are compiled for sm_90 and "launched" on CPU tensors; they compute nothing. Read times and counts, no values.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu import keep_freed_memory


def activate() -> Callable[[], int]:
    """From now on this process runs the ops on the Triton backend over that driver.

    Once, in a process of its own that has not imported triton.

    Returns:
        the number of launches so far.
    """
    keep_freed_memory()  # as on a GPU
    library = _built()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    os.environ.pop("TRITON_INTERPRET", None)
    counting = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    counting.counted_launches.restype = ctypes.c_long

    import triton

    triton.runtime.driver.set_active(_driver())
    import dmdr_fast.backends.triton  # noqa: F401  reads TRITON_INTERPRET
    from dmdr_fast.ops import _checks

    os.environ["TRITON_INTERPRET"] = "1"  # read by now: all it does is to let tensors of the CPU through
    os.environ |= {"DMDR_FAST_BACKEND": "triton", "DMDR_FAST_STRICT": "1"}
    _checks.readable = lambda value: False  # as on a GPU, where nobody waits for a value
    return counting.counted_launches


def _built() -> Path:
    """driver.c as a shared library, beside the name that Triton's own build links with."""
    from triton.backends import nvidia

    folder = Path(tempfile.mkdtemp(prefix="counting_driver_"))
    library = folder / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    source = Path(__file__).with_name("driver.c")
    command = ["gcc", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{include}"]
    subprocess.run([*command, "-o", library, source], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def _driver():
    """Triton's driver of NVIDIA GPUs, which asks PyTorch for the device: there it is told."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    class Driver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_current_stream = lambda device: 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_device_capability(self, device):
            return 9, 0

    return Driver()

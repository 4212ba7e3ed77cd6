"""What the tests compile: the kernels for the CPU (see emulation/), and for sm_90 with nvcc.

Results are kept in pytest's cache under a name that their sources determine, so they are built once.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
ABI = ROOT / "csrc" / "include" / "dmdr" / "abi.h"
EMULATION = Path(__file__).parent / "emulation"

# -fno-strict-aliasing: the kernels move floats as 16-byte words. The sanitizer ends the process at a misaligned one.
_HOST_FLAGS = [
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
    "-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-DDMDR_CUDA_CLUSTERS", f"-I{EMULATION}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{KERNELS}",
]  # fmt: skip


def emulated_library(config: pytest.Config) -> Path:
    """The whole of libdmdr_cuda for the CPU."""
    sources = [*sorted(KERNELS.glob("*.cu")), EMULATION / "emulation.cpp"]
    return _compiled(config, "libdmdr_cuda_emulated.so", sources, ["-shared"])


def device_functions(config: pytest.Config) -> Path:
    """The device functions that device_functions.cpp exports, for the CPU."""
    sources = [Path(__file__).parent / "device_functions.cpp", EMULATION / "emulation.cpp"]
    return _compiled(config, "libdevice_functions.so", sources, ["-shared"])


def faulty_kernels(config: pytest.Config) -> Path:
    """A program that runs one of the wrong kernels of emulation/faults.cpp."""
    return _compiled(config, "faults", [EMULATION / "faults.cpp", EMULATION / "emulation.cpp"], [])


def cuda_library(config: pytest.Config) -> Path:
    """libdmdr_cuda for sm_90, built by the project's own CMake target."""
    if nvcc_version() is None:
        pytest.skip("needs nvcc on PATH")
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake on PATH")
    folder = _folder(config, [*KERNELS.iterdir(), ABI, ROOT / "CMakeLists.txt"], nvcc_version())
    with FileLock(folder / "lock"):
        library = folder / "csrc" / "cuda" / "libdmdr_cuda.so"
        if not library.is_file():
            # SKBUILD: as when building a wheel, the library stays in the build folder instead of the source tree.
            options = ["-DDMDR_CUDA=ON", "-DDMDR_CUDA_ARCHITECTURES=90", "-DSKBUILD=ON"]
            _run(["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *options])
            _run(["cmake", "--build", folder, "--target", "dmdr_cuda"])
    return library


@lru_cache(maxsize=1)
def nvcc_version() -> str | None:
    """Such as "13.0"; None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return text.partition("release ")[2].partition(",")[0]


def _compiled(config: pytest.Config, name: str, sources: list[Path], link_flags: list[str]) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ on PATH")
    if sys.platform != "linux":
        pytest.skip("the emulation of CUDA is for Linux")
    headers = [*KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"), *EMULATION.glob("*.h")]
    folder = _folder(config, [*sources, *headers, ABI], name)
    with FileLock(folder / "lock"):
        binary = folder / name
        if not binary.is_file():
            objects = []
            for source in sources:
                objects.append(folder / f"{source.stem}.o")
                _run([compiler, *_HOST_FLAGS, "-x", "c++", "-c", source, "-o", objects[-1]])
            # Renamed when complete: what is there is whole.
            _run([compiler, *link_flags, "-fsanitize=undefined", "-static-libubsan", *objects, "-o", folder / "new"])
            (folder / "new").rename(binary)
    return binary


def _folder(config: pytest.Config, sources: list[Path], salt: str) -> Path:
    digest = hashlib.sha256(f"{salt} {_HOST_FLAGS}".encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    return config.cache.mkdir(f"dmdr_cuda_{digest.hexdigest()[:16]}")


def _run(command: list[str | Path]) -> None:
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if run.returncode != 0:
        pytest.fail(f"{' '.join(str(word) for word in command)}\n{run.stdout}\n{run.stderr}", pytrace=False)

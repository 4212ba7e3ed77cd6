"""Compiling, for sm_90 and without a GPU, exactly what a raw function would launch.

The raw function runs on meta tensors; every launch is caught and compiled through Triton's own specialisation of its
arguments (divisible by 16, equal to 1, absent), as on a GPU. What comes out is the machine code, which says how many
registers, spills and instructions a kernel has and how wide its loads and stores are.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: per thread.
        stack, spills: bytes of stack per thread; instructions that load or store spilled registers.
        wide_loads, wide_stores: accesses of global memory of 16 bytes a thread.
        narrow_loads, narrow_stores: those of fewer; scalars are among them.
        instructions: of the whole kernel, without padding.
        threads: per block.
    """

    registers: int
    stack: int
    spills: int
    wide_loads: int
    wide_stores: int
    narrow_loads: int
    narrow_stores: int
    instructions: int
    threads: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class _NoDevice:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # compiled kernels are cached by device: not among those of a real one

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiled_instead_of_launched() -> Iterator[list]:
    compiled = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        compiled.append(original(self, *args, grid=grid, warmup=True, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        # Not set_active and reset_active: the latter looks for a driver, and there may be none.
        for name, value in vars(triton.runtime.driver).items():
            patch.setitem(vars(triton.runtime.driver), name, value)
        triton.runtime.driver.set_active(_NoDevice())
        yield compiled


def kernels_of(call: Callable[[], object]) -> dict[str, Resources]:
    """The resources of every kernel that ``call``, on meta tensors, launches; by the kernel's name."""
    with _compiled_instead_of_launched() as compiled:
        call()
    return {kernel.metadata.name: _resources(kernel) for kernel in compiled}


def _resources(kernel) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        usage = _USAGE.search(_dump("-res-usage", cubin))
        names = [name for name in _INSTRUCTION.findall(_dump("-sass", cubin)) if name != "NOP"]
    registers, stack, _, _ = map(int, usage.groups())

    def count(prefix: str, wide: bool) -> int:
        return sum(name.startswith(prefix) and (".128" in name) == wide for name in names)

    return Resources(
        registers=registers,
        stack=stack,
        spills=sum(name.startswith(("LDL", "STL")) for name in names),
        wide_loads=count("LDG", True),
        wide_stores=count("STG", True),
        narrow_loads=count("LDG", False),
        narrow_stores=count("STG", False),
        instructions=len(names),
        threads=32 * kernel.metadata.num_warps,
    )


def _dump(option: str, cubin: str) -> str:
    return subprocess.run([_TOOL, option, cubin], check=True, capture_output=True, text=True).stdout

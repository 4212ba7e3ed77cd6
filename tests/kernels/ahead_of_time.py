"""Compiling, for sm_90 and without a GPU, exactly what a raw function would launch.

The raw function runs on meta tensors; every launch is caught and compiled through Triton's own specialisation of its
arguments (divisible by 16, equal to 1, absent), as on a GPU. What comes out is the machine code, which says how many
registers, spills and instructions a kernel has and how wide its loads and stores are.
"""

from __future__ import annotations

import contextlib
import re
import struct
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
_DISASSEMBLED = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([A-Z0-9_.]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# The lowest 9 bits of an instruction of sm_70 .. sm_90, whatever the form of its operands.
_OPCODES = {0x118: "NOP", 0x181: "LDG", 0x183: "LDL", 0x186: "STG", 0x187: "STL", 0x1AE: "LDGSTS"}
_SIXTEEN_BYTES = 6  # the width of an access, bits 73 .. 75


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
    return {kernel.metadata.name: _resources(kernel) for kernel in compiled_by(call)}


def compiled_by(call: Callable[[], object]) -> list:
    """Triton's compiled kernels, in the order of their launches."""
    with _compiled_instead_of_launched() as compiled:
        call()
    return compiled


def _resources(kernel) -> Resources:
    cubin = kernel.asm["cubin"]
    registers, stack, _, _ = map(int, _USAGE.search(dump("-res-usage", cubin)).groups())
    code = instructions(cubin)

    def count(name: str, wide: bool | None = None) -> int:
        return sum(found == name and wide in (None, is_wide) for found, is_wide in code)

    return Resources(
        registers=registers,
        stack=stack,
        spills=count("LDL") + count("STL"),
        wide_loads=count("LDG", True) + count("LDGSTS", True),
        wide_stores=count("STG", True),
        narrow_loads=count("LDG", False) + count("LDGSTS", False),
        narrow_stores=count("STG", False),
        instructions=len(code) - count("NOP"),
        threads=32 * kernel.metadata.num_warps,
    )


def instructions(cubin: bytes) -> list[tuple[str, bool]]:
    """(name, does it move 16 bytes a thread) of every instruction; "" for one that moves nothing.

    Decoded here because cuobjdump takes 0.6 s for it, of a kernel of any length.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, strings = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    (code,) = (
        cubin[start : start + length]
        for name, _, _, _, start, length in headers
        if cubin.startswith(b".text.", headers[strings][4] + name)
    )
    words = struct.iter_unpack("<QQ", code)
    return [(_OPCODES.get(low & 0x1FF, ""), (high >> 9) & 7 == _SIXTEEN_BYTES) for low, high in words]


def disassembled(cubin: bytes) -> list[tuple[str, bool]]:
    """The same from cuobjdump."""
    known = _OPCODES.values()
    names = _DISASSEMBLED.findall(dump("-sass", cubin))
    return [(name if name in known else "", ".128" in suffix) for name, suffix in names]


def dump(option: str, cubin: bytes) -> str:
    """What cuobjdump says with ``option``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOL, option, file.name], check=True, capture_output=True, text=True).stdout

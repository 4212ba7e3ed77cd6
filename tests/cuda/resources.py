"""What nvcc made of the kernels: registers, spills, widths of memory accesses, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_KERNEL = re.compile(r"(\w+_kernel)(<[^(]*>)?\(")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_USAGE = re.compile(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        registers: per thread.
        stack, spills: bytes of stack per thread; instructions that load or store spilled registers.
        wide_loads, wide_stores: accesses of global memory of 16 bytes a thread.
        narrow_loads, narrow_stores: those of fewer; scalars are among them.
        instructions: of the whole kernel, without padding.
        loading_loop, storing_loop: of the innermost loop that loads or stores 16 bytes; 0 where there is none.
    """

    registers: int
    stack: int
    spills: int
    wide_loads: int
    wide_stores: int
    narrow_loads: int
    narrow_stores: int
    instructions: int
    loading_loop: int
    storing_loop: int


def resources(library: Path) -> dict[str, Resources]:
    """The kernels of a library for one architecture, by name with template arguments."""
    tool = _cuobjdump()
    usage = _run(tool, "--dump-resource-usage", library)
    functions = re.split(r"\n\s*Function : ", _run(tool, "-sass", library))[1:]
    code = {text.split("\n", 1)[0].strip(): text for text in functions}
    found = {}
    for symbol, registers, stack in _USAGE.findall(usage):
        found[_name(symbol)] = _of(code[symbol], int(registers), int(stack))
    return found


def _of(text: str, registers: int, stack: int) -> Resources:
    lines = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(text)]
    names = [name for _, name, _ in lines]

    def count(prefix: str, *parts: str) -> int:
        return sum(name.startswith(prefix) and all(part in name for part in parts) for name in names)

    return Resources(
        registers=registers,
        stack=stack,
        spills=count("LDL") + count("STL"),
        wide_loads=count("LDG", ".128"),
        wide_stores=count("STG", ".128"),
        narrow_loads=count("LDG") - count("LDG", ".128"),
        narrow_stores=count("STG") - count("STG", ".128"),
        instructions=sum(name != "NOP" for name in names),
        loading_loop=_loop(lines, "LDG"),
        storing_loop=_loop(lines, "STG"),
    )


def _loop(lines: list[tuple[int, str, str]], access: str) -> int:
    """Instructions of the shortest range of a backward branch with a 16-byte access in it."""
    loops = []
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is None or int(target.group(1), 16) >= at:
            continue
        body = [other for address, other, _ in lines if int(target.group(1), 16) <= address <= at]
        if any(other.startswith(access) and ".128" in other for other in body):
            loops.append(sum(other != "NOP" for other in body))
    return min(loops, default=0)


def _name(symbol: str) -> str:
    """``renoise_draw_kernel<Bfloat16, false>`` from its mangled name."""
    match = _KERNEL.search(_run("c++filt", symbol).replace("dmdr::", "").replace("(anonymous namespace)::", ""))
    return match.group(1) + (match.group(2) or "")


def _cuobjdump() -> str:
    """The toolkit's, else the one that Triton brings."""
    tool = shutil.which("cuobjdump")
    if tool is not None:
        return tool
    triton = pytest.importorskip("triton", reason="needs cuobjdump: a CUDA toolkit's or Triton's")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _run(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout

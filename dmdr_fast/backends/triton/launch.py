"""The Triton backend: launching kernels, and latents as the kernels see them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dmdr_fast.backends import Backend, at_most
from dmdr_fast.backends.plans import Live, Recorder
from dmdr_fast.backends.triton import checkout  # noqa: F401  before anything of dmdr_fast.kernels
from dmdr_fast.backends.views import shared_view
from dmdr_fast.kernels.elements import Shape, View

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
    raise ImportError(f"triton 3.4 or newer is needed, this is {triton.__version__}")

# The kernels run in Triton's interpreter, on CPU tensors: for tests. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


class Launches(Recorder):
    """Launches Triton kernels on the current stream of the tensors' device."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        """``kernel`` on ``args``: tensors, numbers, None, or named tuples of them.

        The compiler must not fuse multiplications and additions by itself: the kernels say where, so the bits are the
        same under every version of Triton (its default differs) and in every specialisation of a kernel.
        """
        compiled = kernel[grid](*_plain(args), **constants, num_warps=num_warps, enable_fp_fusion=False)
        if INTERPRETED:  # nothing is compiled that could run again
            self._repeatable = False
        elif self.device.type != "meta":  # there it is compiled ahead of time, and launched nowhere
            values = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
            self.note(self._compiled(compiled, grid, values))

    def _compiled(self, compiled: Any, grid: tuple[int, ...], values: list) -> Callable[[list[int]], None]:
        """The compiled kernel by itself: 3 us, where Triton's binder, which works out ``compiled`` again, takes 12.

        The arguments are written out as Python source, as Triton does for its binder: a loop over them costs 3 us.
        """
        names = {
            "run": compiled.run, "function": compiled.function, "metadata": compiled.packed_metadata,
            "stream": triton.runtime.driver.active.get_current_stream, "device": self.device.index or 0,
        }  # fmt: skip
        written = ", ".join(self._written(value, names) for value in values)
        x, y, z = (*grid, 1, 1)[:3]
        source = f"lambda p: run({x}, {y}, {z}, stream(device), function, metadata, None, None, None, {written})"
        return eval(source, names)

    def _written(self, value: Any, names: dict[str, Any]) -> str:
        """``value`` as Python source: a pointer is one of ``p`` (at some bytes), all else a name in ``names``."""
        if isinstance(value, tuple) and any(isinstance(part, (tuple, Tensor, Live)) for part in value):
            return "(" + "".join(self._written(part, names) + ", " for part in value) + ")"
        if isinstance(value, Tensor):
            place, offset = self.place(value) or (0, 0)
            return f"p[{place}] + {offset}" if offset else f"p[{place}]"
        if isinstance(value, Live):
            return f"p[{value.place}]"
        name = f"c{len(names)}"
        names[name] = value
        return name


def _plain(value: Any) -> Any:
    """Without :class:`Live`: Triton knows ints by their exact type."""
    if isinstance(value, tuple):
        return getattr(type(value), "_make", tuple)(_plain(part) for part in value)
    return int(value) if isinstance(value, Live) else value


BACKEND = Backend(Launches)
implements = BACKEND.implements


# 65535 blocks of 2048 elements are the most that the second dimension of a grid takes.
_LARGEST_SAMPLE = 65535 * 2048


def too_large(name: str) -> Callable[[Any], str | None]:
    """Why samples of the argument ``name`` are too large, or None."""
    return at_most(_LARGEST_SAMPLE, "elements", "samples", lambda a: getattr(a, name).shape[1:].numel())


class Samples(NamedTuple):
    """Tensors of one shape [B, ...] for a kernel: B samples of ``shape``; ``views`` of them, None for an absent one."""

    batch: int
    shape: Shape
    views: tuple[View | None, ...]


def samples(*tensors: Tensor | None) -> Samples:
    """The tensors as samples, copies of those whose rows are not contiguous; the first is present and not empty."""
    sizes, held = shared_view(*tensors)
    kept = [dim for dim in range(1, len(sizes) - 1) if sizes[dim] != 1]
    outer = tuple(sizes[dim] for dim in kept)
    views = [one and View(one.tensor, tuple(one.strides[dim] for dim in (0, *kept))) for one in held]
    reaches = [
        sum((size - 1) * step for size, step in zip(outer, one.strides[1:], strict=True)) for one in views if one
    ]
    if max(reaches) + sizes[-1] >= 2**31:  # the kernels index within a sample in 32 bits
        return samples(*(tensor if tensor is None else tensor.contiguous() for tensor in tensors))
    return Samples(sizes[0], Shape(math.prod(outer) * sizes[-1], sizes[-1], outer), tuple(views))


def block_and_warps(count: int, per_thread: int, most: int) -> tuple[int, int]:
    """(block size, warps) for ``count`` elements at ``per_thread`` elements a thread, at most ``most`` a block."""
    block = min(most, max(128, next_power_of_2(count)))
    return block, max(1, min(32, block // (32 * per_thread)))


def tiles(view: Samples, per_thread: int = 8, most: int = 2048) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (samples, blocks of each) and tile of a kernel over elements, see :func:`block_and_warps`."""
    block, warps = block_and_warps(view.shape.count, per_thread, most)
    return (view.batch, cdiv(view.shape.count, block)), {"BLOCK": block, "num_warps": warps}


def seeded_tiles(batch: int, count: int, offset: int, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, int]]:
    """The same of a kernel that draws noise: the blocks of a sample are windows of the stream, at multiples of BLOCK.

    32 elements a thread: seed, key schedule and addresses cost 90 instructions a thread, 3 an element. A thread draws
    GROUP consecutive normals: what a 16-byte access of the dtype holds.
    """
    block, warps = block_and_warps(count, 32, 4096)
    aligned = count % block == 0 and offset % block == 0
    windows = count // block if aligned else cdiv(count - 1, block) + 1
    return (batch, windows), {"BLOCK": block, "GROUP": 4 if dtype is torch.float32 else 8, "num_warps": warps}

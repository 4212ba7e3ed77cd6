"""LoRA with one scale per sample on the kernels of csrc/."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, Library, implements
from dmdr_fast.backends.views import Strided, broadcast, strided

_STRUCT = struct_of(
    "dmdr_multi_lora_args",
    ("int", "batch rows in_features rank out_features"),
    ("tensor", "x base out A B grad grad_x"),
    ("pointer", "scale low_rank grad_a grad_b workspace"),
)

# Of a packed [q | k | v]: what has three blocks, and what q and v have one each of.
_BLOCKS, _PAIRS = {"x", "base_out", "grad", "out", "grad_x"}, {"A", "B", "low_rank", "grad_A", "grad_B"}


def _refuses(library: Library, a) -> str | None:
    in_features, rank = a.A.shape[-2:]
    return None if in_features and rank else f"it has nothing to multiply: A is [{in_features}, {rank}]"


@implements("multi_lora_fwd", refuses=_refuses)
def multi_lora_fwd(run: Calls, a, out) -> None:
    for one, result in _blocks(run, a, out):
        _call(run, "multi_lora_fwd", one, result, 0, base=one.base_out)


@implements("multi_lora_bwd", refuses=_refuses)
def multi_lora_bwd(run: Calls, a, out) -> None:
    """What a sample of scale 0 holds is not read."""
    for one, result in _blocks(run, a, out):
        _call(run, "multi_lora_bwd", one, result, 1, grad_a=result.grad_A, grad_b=result.grad_B)


def _blocks(run: Calls, a, out) -> Iterator[tuple]:
    """(arguments, results) of each block; of k, which passes, as of scale 0 and before those of q, which it shares."""
    if a.A.dim() == 2:
        yield a, out
        return
    zero = run.kept(torch.zeros(a.x.shape[0], dtype=torch.float32, device=run.device))
    for block in (1, 0, 2):
        one, result = _block(run, a, block), _block(run, out, block)
        yield (one._replace(scale=zero) if block == 1 else one), result


def _block(run: Calls, values, block: int):
    views = {}
    for name, value in values._asdict().items():
        if isinstance(value, Tensor) and name in _BLOCKS:
            views[name] = run.part(value.chunk(3, -1)[block], value)
        elif isinstance(value, Tensor) and name in _PAIRS:
            views[name] = run.part(value[block // 2], value)
    return values._replace(**views)


def _call(run: Calls, name: str, a, out, backward: int, /, **given: Any) -> None:
    names = ("batch", "rows", "in_features", "rank", "out_features")
    sizes = dict(zip(names, (a.x.shape[0], math.prod(a.x.shape[1:-1]), *a.A.shape, a.B.shape[1]), strict=True))

    def rows(tensor: Tensor) -> Strided:
        """[B, ..., D] as [B, rows, D]; copied only where the strides of the middle dimensions do not merge."""
        return broadcast(run.view(tensor, sizes["batch"], sizes["rows"], tensor.shape[-1]))

    fields = run.fields(
        _STRUCT, a, out, rows, A=strided(a.A), B=strided(a.B),
        scale=a.scale if a.scale.dim() else a.scale.expand(a.x.shape[0]),
        workspace=run.workspace("multi_lora", *sizes.values(), backward), **sizes, **given,
    )  # fmt: skip
    run.call(name, _STRUCT, fields)

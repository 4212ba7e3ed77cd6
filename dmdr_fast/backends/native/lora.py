"""LoRA with one scale per sample on the kernels of csrc/."""

from __future__ import annotations

import math
from typing import Any

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


def _refuses(library: Library, a) -> str | None:
    in_features, rank = a.A.shape
    return None if in_features and rank else f"it has nothing to multiply: A is [{in_features}, {rank}]"


@implements("multi_lora_fwd", refuses=_refuses)
def multi_lora_fwd(run: Calls, a, out) -> None:
    run.call("multi_lora_fwd", _STRUCT, _fields(run, a, out, 0, base=a.base_out))


@implements("multi_lora_bwd", refuses=_refuses)
def multi_lora_bwd(run: Calls, a, out) -> None:
    """What a sample of scale 0 holds is not read."""
    run.call("multi_lora_bwd", _STRUCT, _fields(run, a, out, 1, grad_a=out.grad_A, grad_b=out.grad_B))


def _fields(run: Calls, a, out, backward: int, /, **given: Any) -> dict[str, Any]:
    names = ("batch", "rows", "in_features", "rank", "out_features")
    sizes = dict(zip(names, (a.x.shape[0], math.prod(a.x.shape[1:-1]), *a.A.shape, a.B.shape[1]), strict=True))
    return run.fields(
        _STRUCT, a, out, lambda tensor: _rows(run, tensor), A=strided(a.A), B=strided(a.B),
        scale=a.scale if a.scale.dim() else a.scale.expand(a.x.shape[0]),
        workspace=run.workspace("multi_lora", *sizes.values(), backward), **sizes, **given,
    )  # fmt: skip


def _rows(run: Calls, tensor: Tensor) -> Strided:
    """[B, ..., D] as [B, rows, D]; copied only where the strides of the middle dimensions do not merge."""
    return broadcast(run.view(tensor, tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1]))

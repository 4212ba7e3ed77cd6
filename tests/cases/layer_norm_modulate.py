"""Cases of layer_norm_modulate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import (
    Call,
    Compiled,
    Draw,
    HostCall,
    Op,
    Raw,
    Sizes,
    large_tokens,
    of_token,
    row_sizes,
    statistics,
    token_layouts,
)

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return ((normal * (1 + of_token(scale, x)) + of_token(shift, x)).to(x.dtype),)


def sweep(d: Choices) -> Case:
    shape = d.token_shape()
    shift, scale = d.modulations(shape, 2)
    return d.case("layer_norm_modulate", {"x": d.normal(*shape), "shift": shift, "scale": scale})


def wrong_arguments() -> wrong.Wrong:
    yield from wrong.tokens()
    yield from wrong.shift_and_scale()
    yield from wrong.numbers("eps", 0.0, -1.0)
    yield from wrong.out_dtypes()


def host(sizes: Sizes) -> dict[str, HostCall]:
    x, shift, scale = sizes.x(), sizes.vector(), sizes.vector()
    call = HostCall(lambda: ops.layer_norm_modulate(x, shift, scale), [x, shift, scale], launches=[1, 3])
    return {"layer_norm_modulate": call}


def _of(draw: Draw, small: bool) -> Iterator[Call]:
    for label, shape, vector in token_layouts(small):
        x, grad, shift, scale = draw(*shape), draw(*shape), draw(*vector), draw(*vector)
        mean, rstd = statistics(draw, shape)
        yield Call("layer_norm_modulate_fwd", label, (x, shift, scale, 1e-6, grad.dtype))
        for need in ((True, True), (True, False), (False, True)):
            yield Call("layer_norm_modulate_bwd", label, (grad, x, scale, mean, rstd, 1e-6, shift.dtype, *need))


def small(draw: Draw) -> Iterator[Call]:
    yield from _of(draw, True)
    for width in (1, 48, 100):  # one feature, two full pieces of a row, a last piece that is not full
        x, vector = draw(2, 5, width), draw(2, 1, width)
        label, stats = f"{width} features", statistics(draw, x.shape)
        yield Call("layer_norm_modulate_fwd", label, (x, vector, vector, 1e-6, x.dtype))
        yield Call("layer_norm_modulate_bwd", label, (x, x, vector, *stats, 1e-6, x.dtype, True, True))


def large() -> Iterator[Call]:
    x, grad = large_tokens(2)
    shift, scale, mean, rstd = torch.randn(2, 1, 160), torch.randn(2, 1, 160), torch.randn(2, 200), torch.rand(2, 200)
    yield Call("layer_norm_modulate_fwd", "large", (x, shift, scale, 1e-6, torch.float32))
    for vector in (scale, torch.randn(160)):
        args = (grad, x, vector, mean, rstd, 1e-6, torch.float32, True, True)
        yield Call("layer_norm_modulate_bwd", "large", args)


def compiled() -> dict[str, Compiled]:
    found = {}
    for label, x, rows, _, row in row_sizes():
        launches = label == "1536 features"
        found[f"layer_norm_modulate_fwd, {label}"] = Compiled(
            "layer_norm_modulate_fwd",
            (x, rows, rows, 1e-6, torch.bfloat16),
            {"layer_norm_modulate_kernel": x.shape[-1]},
            launches=1 if launches else None,
        )
        found[f"layer_norm_modulate_bwd, {label}"] = Compiled(
            "layer_norm_modulate_bwd",
            (x, x, rows, row, row, 1e-6, torch.bfloat16, True, True),
            {"layer_norm_modulate_bwd_kernel": x.shape[-1]},
            launches=2 if launches else None,
        )
    return found


OPS = {
    "layer_norm_modulate": Op(
        valid=lambda draw: {"x": draw(3, 4, 8), "shift": draw(3, 8), "scale": draw(3, 8)},
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="x shift scale",
        vectors="shift scale",
        host=host,
        rows=True,
    )
}
RAW = Raw(
    calls=lambda draw: _of(draw, False),
    small=small,
    large=large,
    compiled=compiled,
    instructions={"layer_norm_modulate_kernel": 26, "layer_norm_modulate_bwd_kernel": 48},
)

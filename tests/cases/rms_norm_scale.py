"""Cases of rms_norm_scale."""

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
    leaf,
    of_token,
    row_sizes,
    statistics,
    token_layouts,
)

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(x: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, ...]:
    return ((F.rms_norm(x, x.shape[-1:], weight, eps=1e-6) * of_token(scale, x)).to(x.dtype),)


def sweep(d: Choices) -> Case:
    shape = d.token_shape()
    tensors = {"x": d.normal(*shape), "weight": d.normal(shape[2]), "scale": d.modulations(shape, 1)[0]}
    return d.case("rms_norm_scale", tensors)


def wrong_arguments() -> wrong.Wrong:
    yield from wrong.tokens()
    yield from wrong.modulations("scale")
    yield from wrong.out_dtypes()
    yield from wrong.weights()
    yield from wrong.numbers("eps", 0.0, -1.0)


def host(sizes: Sizes) -> dict[str, HostCall]:
    x, weight, scale = sizes.x(), leaf(sizes.width), sizes.vector()
    return {"rms_norm_scale": HostCall(lambda: ops.rms_norm_scale(x, weight, scale), [x, weight, scale])}


def _of(draw: Draw, small: bool) -> Iterator[Call]:
    for label, shape, vector in token_layouts(small):
        x, grad, scale = draw(*shape), draw(*shape), draw(*vector)
        _, rstd = statistics(draw, shape)
        for weight in (draw(shape[-1]), None):
            yield Call("rms_norm_scale_fwd", label, (x, weight, scale, 1e-6, grad.dtype))
            weighted = weight is not None
            for need in ((True, weighted, True), (False, weighted, False), *([] if small else [(True, False, False)])):
                yield Call("rms_norm_scale_bwd", label, (grad, x, weight, scale, rstd, 1e-6, *need))


def large() -> Iterator[Call]:
    x, grad = large_tokens(2)
    weight, scale, rstd = torch.randn(160), torch.randn(2, 1, 160), torch.rand(2, 200)
    yield Call("rms_norm_scale_fwd", "large", (x, weight, scale, 1e-6, torch.float32))
    yield Call("rms_norm_scale_bwd", "large", (x, grad, weight, scale, rstd, 1e-6, True, True, True))


def compiled() -> dict[str, Compiled]:
    found = {}
    for label, x, rows, weight, row in row_sizes():
        found[f"rms_norm_scale_fwd, {label}"] = Compiled(
            "rms_norm_scale_fwd",
            (x, weight, rows, 1e-5, torch.bfloat16),
            {"rms_norm_scale_kernel": x.shape[-1]},
        )
        found[f"rms_norm_scale_bwd, {label}"] = Compiled(
            "rms_norm_scale_bwd",
            (x, x, weight, rows, row, 1e-5, True, True, True),
            {"rms_norm_scale_bwd_kernel": x.shape[-1]},
        )
    return found


OPS = {
    "rms_norm_scale": Op(
        valid=lambda draw: {"x": draw(3, 4, 8), "weight": draw(8), "scale": draw(3, 8)},
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="x weight scale",
        vectors="scale",
        host=host,
        rows=True,
    )
}
RAW = Raw(
    calls=lambda draw: _of(draw, False),
    small=lambda draw: _of(draw, True),
    large=large,
    compiled=compiled,
    instructions={"rms_norm_scale_kernel": 20, "rms_norm_scale_bwd_kernel": 45},
)

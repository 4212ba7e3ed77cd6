"""Cases of gated_residual_rms_norm."""

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
    token_layouts,
)

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    return ((x + of_token(gate, x) * F.rms_norm(h, h.shape[-1:], weight, eps=1e-6)).to(x.dtype),)


def sweep(d: Choices) -> Case:
    shape = d.token_shape()
    tensors = {"x": d.normal(*shape), "h": d.normal(*shape), "gate": d.modulations(shape, 1)[0]}
    tensors["weight"] = d.one_of(None, d.normal(shape[2]))
    return d.case("gated_residual_rms_norm", tensors)


def wrong_arguments() -> wrong.Wrong:
    yield from wrong.weights()
    yield from wrong.numbers("eps", 0.0, -1.0)
    yield from wrong.branches()


def host(sizes: Sizes) -> dict[str, HostCall]:
    leaves = [sizes.x(), sizes.x(), sizes.vector(), leaf(sizes.width)]
    return {"gated_residual_rms_norm": HostCall(lambda: ops.gated_residual_rms_norm(*leaves), leaves)}


# Its backward is another op's.
def _of(draw: Draw, small: bool) -> Iterator[Call]:
    for label, shape, vector in token_layouts(small):
        x, h, gate = draw(*shape), draw(*shape), draw(*vector)
        for weight in (draw(shape[-1]), None):
            yield Call("gated_residual_rms_norm_fwd", label, (x, h, gate, weight, 1e-6))


def large() -> Iterator[Call]:
    args = (*large_tokens(2), torch.randn(2, 1, 160), torch.randn(160), 1e-6)
    yield Call("gated_residual_rms_norm_fwd", "large", args)


def compiled() -> dict[str, Compiled]:
    return {
        f"gated_residual_rms_norm_fwd, {label}": Compiled(
            "gated_residual_rms_norm_fwd",
            (x, x, rows, weight, 1e-5),
            {"gated_residual_rms_norm_kernel": x.shape[-1]},
        )
        for label, x, rows, weight, _ in row_sizes()
    }


OPS = {
    "gated_residual_rms_norm": Op(
        valid=lambda draw: {"x": draw(3, 4, 8), "h": draw(3, 4, 8), "gate": draw(3, 8), "weight": draw(8)},
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="x h gate weight",
        vectors="gate",
        host=host,
        rows=True,
    )
}
RAW = Raw(
    calls=lambda draw: _of(draw, False),
    small=lambda draw: _of(draw, True),
    large=large,
    compiled=compiled,
    instructions={"gated_residual_rms_norm_kernel": 24},
)

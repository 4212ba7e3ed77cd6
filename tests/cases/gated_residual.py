"""Cases of gated_residual."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import Call, Compiled, Draw, HostCall, Op, Raw, Sizes, meta, of_token, token_layouts

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(x: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return ((x + of_token(gate, x) * h).to(x.dtype),)


def sweep(d: Choices) -> Case:
    shape = d.token_shape()
    tensors = {"x": d.normal(*shape), "h": d.normal(*shape), "gate": d.modulations(shape, 1)[0]}
    return d.case("gated_residual", tensors)


def host(sizes: Sizes) -> dict[str, HostCall]:
    x, h, gate = sizes.x(), sizes.x(), sizes.vector()
    return {"gated_residual": HostCall(lambda: ops.gated_residual(x, h, gate), [x, h, gate])}


def _of(draw: Draw, small: bool) -> Iterator[Call]:
    for label, shape, vector in token_layouts(small):
        x, h, grad, gate = draw(*shape), draw(*shape), draw(*shape), draw(*vector)
        yield Call("gated_residual_fwd", label, (x, h, gate))
        for need in ((True, True), (False, True), *([(True, False)] if small else [])):
            yield Call("gated_residual_bwd", label, (grad, h, gate, *need))


def compiled() -> dict[str, Compiled]:
    x, gate = meta(4, 4096, 1536), meta(4, 1, 1536)
    return {
        "gated_residual_fwd": Compiled(
            "gated_residual_fwd",
            (x, x, gate),
            {"gated_residual_kernel": 4096},
        ),
        "gated_residual_bwd": Compiled(
            "gated_residual_bwd",
            (x, x, gate, True, True),
            {"gated_residual_bwd_kernel": 4096},
        ),
    }


OPS = {
    "gated_residual": Op(
        valid=lambda draw: {"x": draw(3, 4, 8), "h": draw(3, 4, 8), "gate": draw(3, 8)},
        formula=formula,
        sweep=sweep,
        wrong=wrong.branches,
        wrt="x h gate",
        vectors="gate",
        host=host,
        rows=True,
    )
}
RAW = Raw(calls=lambda draw: _of(draw, False), small=lambda draw: _of(draw, True), compiled=compiled)

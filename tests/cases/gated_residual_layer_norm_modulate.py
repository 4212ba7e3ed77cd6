"""Cases of gated_residual_layer_norm_modulate."""

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


def formula(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, ...]:
    residual = (x + of_token(gate, x) * h).to(x.dtype)
    rounded = residual if kept is None else kept + (residual - residual.detach())
    normal = F.layer_norm(rounded, x.shape[-1:], eps=1e-6)
    return residual, (normal * (1 + of_token(scale, x)) + of_token(shift, x)).to(rounded.dtype)


def sweep(d: Choices) -> Case:
    shape = d.token_shape()
    tensors = {"x": d.normal(*shape), "h": d.normal(*shape), "gate": d.modulations(shape, 1)[0]}
    tensors["shift"], tensors["scale"] = d.modulations(shape, 2)
    return d.case("gated_residual_layer_norm_modulate", tensors)


def wrong_arguments() -> wrong.Wrong:
    yield from wrong.tokens()
    yield from wrong.shift_and_scale()
    yield from wrong.numbers("eps", 0.0, -1.0)
    yield from wrong.out_dtypes()
    yield from wrong.branches()


def host(sizes: Sizes) -> dict[str, HostCall]:
    leaves = [sizes.x(), sizes.x(), sizes.vector(), sizes.vector(), sizes.vector()]
    call = HostCall(lambda: ops.gated_residual_layer_norm_modulate(*leaves), leaves, launches=[1, 3])
    return {"gated_residual_layer_norm_modulate": call}


def _of(draw: Draw, small: bool) -> Iterator[Call]:
    for label, shape, vector in token_layouts(small):
        x, h, grad, grad_y = (draw(*shape) for _ in range(4))
        shift, scale, gate = (draw(*vector) for _ in range(3))
        stats, shared = statistics(draw, shape), draw(shape[-1])
        yield Call("gated_residual_layer_norm_modulate_fwd", label, (x, h, gate, shift, scale, 1e-6, grad.dtype))
        for grads, need in (
            ((grad, grad_y), (True, True, True)),
            ((None, grad_y), (not small, True, True)),
            ((grad, None), (True, not small, True)),
        ):
            for gates in (shared,) if small else (gate, shared):
                args = (*grads, x, h, gates, scale, *stats, 1e-6, shift.dtype, *need)
                yield Call("gated_residual_layer_norm_modulate_bwd", label, args)


def large() -> Iterator[Call]:
    gate, scale, mean, rstd = torch.randn(2, 1, 160), torch.randn(2, 1, 160), torch.randn(2, 200), torch.rand(2, 200)
    args = (*large_tokens(4), gate, scale, mean, rstd, 1e-6, torch.float32, True, True, True)
    yield Call("gated_residual_layer_norm_modulate_bwd", "large", args)


def compiled() -> dict[str, Compiled]:
    name, found = "gated_residual_layer_norm_modulate", {}
    for label, x, rows, _, row in row_sizes():
        found[f"{name}_fwd, {label}"] = Compiled(
            f"{name}_fwd",
            (x, x, rows, rows, rows, 1e-6, torch.bfloat16),
            {f"{name}_kernel": x.shape[-1]},
        )
        args = (x, x, x, x, rows, rows, row, row, 1e-6, torch.bfloat16, True, True, True)
        found[f"{name}_bwd, {label}"] = Compiled(
            f"{name}_bwd",
            args,
            {f"{name}_bwd_kernel": x.shape[-1]},
            launches=2 if label == "1536 features" else None,
        )
    return found


def exact(reference, args: list, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    residual, *_ = reference.gated_residual_layer_norm_modulate_fwd(*args)
    return residual, *reference.layer_norm_modulate_fwd(results[0].double(), *args[3:])


OPS = {
    "gated_residual_layer_norm_modulate": Op(
        valid=lambda draw: {
            **{name: draw(3, 4, 8) for name in ("x", "h")},
            **{name: draw(3, 8) for name in ("gate", "shift", "scale")},
        },
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="x h gate shift scale",
        keeps=True,
        vectors="gate shift scale",
        host=host,
        rows=True,
    )
}
RAW = Raw(
    calls=lambda draw: _of(draw, False),
    small=lambda draw: _of(draw, True),
    large=large,
    compiled=compiled,
    instructions={
        "gated_residual_layer_norm_modulate_kernel": 32,
        "gated_residual_layer_norm_modulate_bwd_kernel": 70,
    },
    exact={"gated_residual_layer_norm_modulate_fwd": exact},
)

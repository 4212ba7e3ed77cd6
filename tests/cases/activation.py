"""Cases of gelu_mul and silu_mul."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import LATENTS, Call, Compiled, Draw, HostCall, Op, Raw, Sizes, leaf, meta

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


def gelu_formula(packed: Tensor) -> tuple[Tensor, ...]:
    value, gate = packed.chunk(2, -1)
    return (value * F.gelu(gate),)


def silu_formula(packed: Tensor) -> tuple[Tensor, ...]:
    value, gate = packed.chunk(2, -1)
    return (value * F.silu(gate),)


def sweep(d: Choices, op: str) -> Case:
    *outer, width = d.latent_shape()
    return d.case(op, {"packed": d.normal(*outer, 2 * width)})


def wrong_packed() -> wrong.Wrong:
    yield {"packed": torch.randn(2, 7)}, r"packed: expected an even last dimension 2F, got shape \[2, 7\]"
    yield {"packed": torch.tensor(1.0)}, "packed: expected at least 1 dimensions"


def wrong_gelu() -> wrong.Wrong:
    yield from wrong_packed()
    yield {"approximate": "erf"}, "approximate: expected one of 'none', 'tanh', got 'erf'"


def gelu_host(sizes: Sizes) -> dict[str, HostCall]:
    packed = leaf(sizes.batch, sizes.tokens, 2 * sizes.width)
    return {"gelu_mul": HostCall(lambda: ops.gelu_mul(packed), [packed])}


def silu_host(sizes: Sizes) -> dict[str, HostCall]:
    packed = leaf(sizes.batch, sizes.tokens, 2 * sizes.width)
    return {"silu_mul": HostCall(lambda: ops.silu_mul(packed), [packed], launches=[1, 2])}


def _of(draw: Draw, shapes: tuple) -> Iterator[Call]:
    for shape in shapes:
        packed, grad = 2 * draw(*shape[:-1], 2 * shape[-1]), draw(*shape)
        for activation in ACTIVATIONS:
            label = f"{activation}-{'x'.join(map(str, shape))}"
            for gate_first in (False, True):
                yield Call("gated_activation_fwd", label, (packed, activation, gate_first))
                yield Call("gated_activation_bwd", label, (grad, packed, activation, gate_first))


def compiled() -> dict[str, Compiled]:
    packed, half, found = meta(4, 4096, 8192), meta(4, 4096, 4096), {}
    for activation in ACTIVATIONS:
        found[f"gated_activation_fwd, {activation}"] = Compiled(
            "gated_activation_fwd",
            (packed, activation, False),
            {"gated_activation_kernel": 2048},
        )
        found[f"gated_activation_bwd, {activation}"] = Compiled(
            "gated_activation_bwd",
            (half, packed, activation, False),
            {"gated_activation_bwd_kernel": 2048},
        )
    return found


OPS = {
    "gelu_mul": Op(
        valid=lambda draw: {"packed": draw(2, 8)},
        formula=gelu_formula,
        sweep=lambda d: sweep(d, "gelu_mul"),
        wrong=wrong_gelu,
        wrt="packed",
        host=gelu_host,
    ),
    "silu_mul": Op(
        valid=lambda draw: {"packed": draw(2, 8)},
        formula=silu_formula,
        sweep=lambda d: sweep(d, "silu_mul"),
        wrong=wrong_packed,
        wrt="packed",
        host=silu_host,
        rows=True,
    ),
}
RAW = Raw(calls=lambda draw: _of(draw, LATENTS), small=lambda draw: _of(draw, ((2, 3, 33),)), compiled=compiled)

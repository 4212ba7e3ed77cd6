"""Cases of qk_norm_rope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import Call, Compiled, Draw, HostCall, Op, Raw, Sizes, leaf, meta

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, interleaved: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        y = y if weight is None else y * weight
        if cos is None:
            return y.to(x.dtype)
        pairs = y.unflatten(-1, (-1, 2)) if interleaved else y.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1)
        turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
        return (y * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)

    return rotated(q, q_weight), rotated(k, k_weight)


def sweep(d: Choices) -> Case:
    batch, tokens, width = d.batch(), d.size(1, 5), 2 * d.size(3, 17)
    tensors = {name: d.normal(batch, tokens, d.size(1, 3), width) for name in ("q", "k")}
    if d.one_of(True, False):
        tensors |= {name: d.normal(width) for name in ("q_weight", "k_weight")}
    if d.one_of(True, False):
        table = d.one_of((tokens, width), (batch, tokens, width))
        tensors |= {name: d.normal(*table) for name in ("cos", "sin")}
    return d.case("qk_norm_rope", tensors, interleaved=d.one_of(True, False))


def wrong_arguments() -> wrong.Wrong:
    draw = torch.randn
    yield {"q": draw(3, 5, 8)}, r"q: expected \[B, T, heads, D\], got shape \[3, 5, 8\]"
    yield {"k": draw(3, 4, 1, 8)}, r"k: expected shape \[3, 5, 1, 8\] .* got \[3, 4, 1, 8\]"
    for name in ("q_weight", "k_weight"):
        yield {name: draw(7)}, rf"{name}: expected shape \[8\] \(D\), got \[7\]"
    for name in ("cos", "sin"):
        yield {name: draw(5, 4)}, rf"{name}: expected shape \[5, 8\] \(T, D\), got \[5, 4\]"
        yield {name: draw(1, 5, 8)}, rf"{name}: expected shape \[3, 5, 8\] \(B, T, D\), got \[1, 5, 8\]"
        yield {name: None}, f"{name}: expected with its counterpart, got None"
    odd = {"q": draw(3, 5, 2, 7), "k": draw(3, 5, 1, 7), "q_weight": None, "k_weight": None}
    tables = {"cos": draw(5, 7), "sin": draw(5, 7)}
    yield {**odd, **tables}, "q: expected an even D for the rotation, got 7"
    yield from wrong.numbers("eps", 0.0)


def host(sizes: Sizes) -> dict[str, HostCall]:
    width = sizes.width // sizes.heads
    q, k = (leaf(sizes.batch, sizes.tokens, sizes.heads, width) for _ in range(2))
    leaves, table = [q, k, leaf(width), leaf(width)], torch.randn(sizes.tokens, width)
    return {"qk_norm_rope": HostCall(lambda: ops.qk_norm_rope(*leaves, table, table), leaves, launches=[1, 3])}


def _of(draw: Draw, sizes: tuple, small: bool) -> Iterator[Call]:
    for batch, rows, heads_q, heads_k, features in sizes:
        q, grad_q = (draw(batch, rows, heads_q, features) for _ in range(2))
        # Keys as attention code often has them: heads before tokens in memory.
        k, grad_k = (draw(batch, heads_k, rows, features).transpose(1, 2) for _ in range(2))
        weights, angles = (draw(features), draw(features)), (draw(1, rows, features), draw(1, rows, features))
        q_rstd = draw.per_sample(batch * rows * heads_q).view(batch, rows, heads_q)
        k_rstd = draw.per_sample(batch * rows * heads_k).view(batch, rows, heads_k)
        for variant, w, a, interleaved in (
            ("interleaved", weights, angles, True),
            ("halves", weights, angles, False),
            ("no-rope", (None, weights[0]), (None, None), True),
            ("no-weights", (None, None), tuple(draw(batch, rows, features) for _ in range(2)), True),
        ):
            label = f"{variant}-{batch}x{rows}x{heads_q}x{features}"
            yield Call("qk_norm_rope_fwd", label, (q, k, *w, *a, 1e-6, interleaved))
            rest = (q, k, *w, *a, q_rstd, k_rstd, 1e-6, interleaved)
            yield Call("qk_norm_rope_bwd", label, (grad_q, grad_k, *rest, True))
            yield Call("qk_norm_rope_bwd", f"k-{label}", (None, grad_k, *rest, True))
            if not small:
                yield Call("qk_norm_rope_bwd", f"q-{label}", (grad_q, None, *rest, False))


SIZES = ((2, 5, 3, 3, 64), (1, 130, 4, 2, 32), (0, 3, 2, 2, 8), (2, 3, 1, 2, 10))


def small(draw: Draw) -> Iterator[Call]:
    yield from _of(draw, ((2, 3, 3, 2, 16), (2, 3, 3, 2, 22)), True)
    odd = draw(1, 2, 2, 15)
    yield Call("qk_norm_rope_fwd", "odd", (odd, odd, None, None, None, None, 1e-6, True))


def large() -> Iterator[Call]:
    heads, angles, weight = [torch.randn(2, 200, 4, 64) for _ in range(4)], torch.randn(2, 1, 200, 64), torch.randn(64)
    rstd = torch.rand(2, 200, 4)
    yield Call("qk_norm_rope_bwd", "large", (*heads, weight, weight, *angles, rstd, rstd, 1e-6, True, True))


def compiled() -> dict[str, Compiled]:
    q, weight, table = meta(4, 4096, 24, 128), meta(128), meta(1, 4096, 128, dtype=torch.float32)
    rstd, found = meta(4, 4096, 24, dtype=torch.float32), {}
    for interleaved, pairs in ((True, "neighbours"), (False, "halves")):
        given = q, q, weight, weight, table, table
        found[f"qk_norm_rope_fwd, {pairs}"] = Compiled(
            "qk_norm_rope_fwd",
            (*given, 1e-6, interleaved),
            {"qk_norm_rope_kernel": 2 * 1024},  # queries and keys are both in the code
        )
        found[f"qk_norm_rope_bwd, {pairs}"] = Compiled(
            "qk_norm_rope_bwd",
            (q, q, *given, rstd, rstd, 1e-6, interleaved, True),
            {"qk_norm_rope_bwd_kernel": 2 * 1024},
            launches=2 if interleaved else None,
        )
    return found


OPS = {
    "qk_norm_rope": Op(
        valid=lambda draw: {
            "q": draw(3, 5, 2, 8),
            "k": draw(3, 5, 1, 8),
            **{name: draw(8) for name in ("q_weight", "k_weight")},
            **{name: draw(5, 8) for name in ("cos", "sin")},
        },
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="q k q_weight k_weight",
        constants="cos sin",
        variants={
            "halves": {"q_weight": None, "interleaved": False},
            "no rotation": {"cos": None, "sin": None},
        },
        host=host,
        rows=True,
    )
}
RAW = Raw(
    calls=lambda draw: _of(draw, SIZES, False),
    small=small,
    large=large,
    compiled=compiled,
)

"""Cases of multi_lora."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmdr_fast import ops
from tests.cases import _wrong as wrong
from tests.cases._kinds import Call, Compiled, Draw, HostCall, Op, Raw, Sizes, large_tokens, leaf, meta, of_sample

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices


def formula(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    if A.dim() == 3:
        q, k, v = (block + 0 * block for block in base_out.chunk(3, -1))
        ends = zip((q, v), x.chunk(3, -1)[::2], A, B, strict=True)
        q, v = (base + of_sample(scale, x) * ((end @ a) @ b) for base, end, a, b in ends)
        return (torch.cat((q, k, v), -1),)
    return (base_out + of_sample(scale, x) * ((x @ A) @ B),)


def sweep(d: Choices) -> Case:
    outer = d.batch(), *[d.size(1, 6) for _ in range(d.size(0, 2))]
    n_in, rank, n_out = d.size(8, 40), d.size(1, 20), d.size(8, 40)
    pair, blocks = d.one_of(((), 1), ((2,), 3))
    tensors = {
        "x": d.normal(*outer, blocks * n_in), "base_out": d.normal(*outer, blocks * n_out),
        "A": d.normal(*pair, n_in, rank), "B": d.normal(*pair, rank, n_out), "scale": d.uniform(0.2, 1.5, outer[0]),
    }  # fmt: skip
    if outer[0] > 1:
        tensors["scale"][1] = 0
    return d.case("multi_lora", tensors)


def wrong_arguments() -> wrong.Wrong:
    yield {"x": torch.randn(6)}, "x: expected at least 2 dimensions"
    yield {"A": torch.randn(5, 2)}, r"A: expected shape \[6, 2\] .* got \[5, 2\]"
    yield {"A": torch.randn(6)}, r"A: expected 2 dimensions, got shape \[6\]"
    yield {"B": torch.randn(3, 7)}, r"B: expected shape \[2, 7\] .* got \[3, 7\]"
    yield {"base_out": torch.randn(3, 4, 8)}, r"base_out: expected shape \[3, 4, 7\] .* got \[3, 4, 8\]"
    pair = {"A": torch.randn(2, 2, 3), "B": torch.randn(2, 3, 7)}
    yield {**pair, "x": torch.randn(3, 4, 7)}, r"x: expected three blocks of one size, as A is a pair, got .* 7\]"
    yield {**pair, "B": torch.randn(3, 7)}, r"B: expected shape \[2, 3, 7\] .* got \[3, 7\]"
    yield pair, r"base_out: expected shape \[3, 4, 21\] .* got \[3, 4, 7\]"
    yield from wrong.scalars("scale")


def host(sizes: Sizes) -> dict[str, HostCall]:
    leaves = [sizes.x(), sizes.x(), leaf(sizes.width, 16), leaf(16, sizes.width)]
    packed = [leaf(sizes.batch, sizes.tokens, 3 * sizes.width), leaf(2, sizes.width, 16), leaf(2, 16, sizes.width)]
    calls = {
        label: HostCall(lambda scale=scale: ops.multi_lora(*leaves, scale), leaves, launches=[2, 6])
        for label, scale in (
            ("multi_lora", torch.rand(sizes.batch)),
            ("multi_lora, 0-d scale", torch.tensor(0.5)),
        )
    }
    scale = torch.rand(sizes.batch)
    post = HostCall(lambda: ops.multi_lora(packed[0], *packed, scale), packed, launches=[2, 6])
    return {**calls, "multi_lora, packed": post}


def calls(draw: Draw) -> Iterator[Call]:
    for batch, rows, n_in, rank, n_out in (
        (2, (5,), 33, 3, 17),
        (3, (4, 9), 64, 8, 48),
        (1, (200,), 96, 16, 530),
        (2, (), 7, 1, 5),
        (0, (3,), 4, 2, 4),
        (2, (130,), 1030, 40, 20),
    ):
        label = f"{batch}-{n_in}-{rank}-{n_out}"
        x, base, grad = (draw(batch, *rows, size) for size in (n_in, n_out, n_out))
        A, B, low_rank = draw(n_in, rank), draw(rank, n_out), draw(batch, *rows, rank, dtype=torch.float32)
        scale = draw.per_sample(batch)
        if batch == 3:
            scale[1] = 0
            low_rank[1] = 0
            A = A.mT.contiguous().mT
        yield Call("multi_lora_fwd", label, (x, base, A, B, scale))
        for need in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            yield Call("multi_lora_bwd", label, (grad, x, low_rank, A, B, scale, *need))
    for tokens, n_in, rank, n_out in (((5,), 33, 3, 17), ((), 7, 1, 5), ((2, 70), 64, 40, 66)):
        yield from _packed(draw, tokens, n_in, rank, n_out)


def _packed(draw: Draw, tokens: tuple[int, ...], n_in: int, rank: int, n_out: int) -> Iterator[Call]:
    x, base, grad = (draw(3, *tokens, 3 * size) for size in (n_in, n_out, n_out))
    A, B, low_rank = draw(2, n_in, rank), draw(2, rank, n_out), draw(2, 3, *tokens, rank, dtype=torch.float32)
    scale, label = torch.tensor([0.7, 0.0, 1.3]), f"packed-{n_in}-{rank}-{n_out}"
    low_rank[:, 1] = 0
    yield Call("multi_lora_fwd", label, (x, base, A, B, scale))
    for need in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
        yield Call("multi_lora_bwd", label, (grad, x, low_rank, A, B, scale, *need))


def small(draw: Draw) -> Iterator[Call]:
    for tokens, n_in, rank, n_out in (((5,), 33, 3, 17), ((), 20, 17, 16), ((2, 40), 70, 4, 20)):
        x, base, grad = (draw(3, *tokens, size) for size in (n_in, n_out, n_out))
        A, B, low_rank = draw(rank, n_in).mT, draw(rank, n_out), draw(3, *tokens, rank, dtype=torch.float32)
        scale = torch.tensor([0.7, 0.0, 1.3])
        low_rank[1] = 0
        yield Call("multi_lora_fwd", f"rank-{rank}", (x, base, A, B, scale))
        for need in ((True, True, True), (False, True, False)):
            yield Call("multi_lora_bwd", f"rank-{rank}", (grad, x, low_rank, A, B, scale, *need))
    yield from _packed(draw, (5,), 20, 3, 18)
    x, base, grad = draw(3, 5, 33), draw(3, 5, 17), draw(3, 5, 17)
    A, B, low_rank = draw(33, 3), draw(3, 17), draw(3, 5, 3, dtype=torch.float32)
    for label, scale in (("expanded", torch.tensor([0.7]).expand(3)), ("0-d", torch.tensor(0.7))):  # not copied
        yield Call("multi_lora_fwd", label, (x, base, A, B, scale))
        yield Call("multi_lora_bwd", label, (grad, x, low_rank, A, B, scale, True, True, True))


def large() -> Iterator[Call]:
    (x, base), A, B = large_tokens(2), torch.randn(160, 12), torch.randn(12, 160)
    low_rank, scale = torch.randn(2, 200, 12), torch.rand(2) * 0.5 + 0.3
    for dtype in (torch.float32, torch.bfloat16):
        given = [tensor.to(dtype) for tensor in (x, base, A, B)]
        yield Call("multi_lora_fwd", "large", (*given, scale))
        yield Call("multi_lora_bwd", "large", (*given[:2], low_rank, *given[2:], scale, True, True, True))


def compiled() -> dict[str, Compiled]:
    x, A, B, scale = meta(4, 4096, 1536), meta(1536, 64), meta(64, 1536), meta(4, dtype=torch.float32)
    low_rank, tile = meta(4, 4096, 64, dtype=torch.float32), 64 * 64
    products = {"project_kernel": tile, "expand_kernel": tile}
    packed, pair = meta(4, 4096, 3 * 1536), (meta(2, 1536, 64), meta(2, 64, 1536))
    pair_rank = meta(2, 4, 4096, 64, dtype=torch.float32)
    return {
        "multi_lora_fwd": Compiled(
            "multi_lora_fwd",
            (x, x, A, B, scale),
            products,
            launches=2,
        ),
        "multi_lora_bwd": Compiled(
            "multi_lora_bwd",
            (x, x, low_rank, A, B, scale, True, True, True),
            {**products, "outer_sums_kernel": tile},
            launches=4,
        ),
        "multi_lora_fwd, packed": Compiled(
            "multi_lora_fwd",
            (packed, packed, *pair, scale),
            products,
            launches=2,
        ),
        "multi_lora_bwd, packed": Compiled(
            "multi_lora_bwd",
            (packed, packed, pair_rank, *pair, scale, True, True, True),
            {**products, "outer_sums_kernel": tile},
            launches=4,
        ),
        "multi_lora_fwd, float32 adapter": Compiled(
            "multi_lora_fwd",
            (x, x, A.float(), B.float(), scale),
            products,
        ),
    }


OPS = {
    "multi_lora": Op(
        valid=lambda draw: {
            "x": draw(3, 4, 6),
            "base_out": draw(3, 4, 7),
            "A": draw(6, 2),
            "B": draw(2, 7),
            "scale": torch.tensor([1.0, 0.5, 0.0]),
        },
        formula=formula,
        sweep=sweep,
        wrong=wrong_arguments,
        wrt="x base_out A B",
        constants="scale",
        variants={
            "packed": {
                "x": torch.linspace(-1, 1, 216).view(3, 4, 18),
                "base_out": torch.linspace(2, -1, 252).view(3, 4, 21),
                "A": torch.linspace(-1, 2, 24).view(2, 6, 2),
                "B": torch.linspace(1, -2, 28).view(2, 2, 7),
            }
        },
        host=host,
    )
}
RAW = Raw(
    calls=calls,
    small=small,
    large=large,
    compiled=compiled,
)

"""RMS norm and rotary embedding of queries and keys on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import cdiv, launch, next_power_of_2
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.kernels.qk_norm_rope import Heads, Side, Table, qk_norm_rope_bwd_kernel, qk_norm_rope_kernel

# Elements of a block of heads: 32 a thread of one warp forward, 16 of two backward.
_BLOCK = 1024
# Programs per block of heads in a backward that sums the weights' gradients.
_PROGRAMS = 256


def qk_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.qk_norm_rope_fwd`."""
    batch, tokens, _, width = q.shape
    outs = [x.new_empty(x.shape) for x in (q, k)]
    rstds = [x.new_empty(x.shape[:-1], dtype=torch.float32) for x in (q, k)]
    sides = [
        Side(_heads(x), None, _vector(weight), out, rstd, None, x.shape[2])
        for x, weight, out, rstd in zip((q, k), (q_weight, k_weight), outs, rstds, strict=True)
    ]
    tile = _tile(width, interleaved, cos)
    blocks = [cdiv(x.shape[2], tile["HEADS"]) for x in (q, k)]
    launch(
        qk_norm_rope_kernel, (batch * tokens, sum(blocks)), *sides, _table(cos), _table(sin), tokens, width,
        cdiv(width, 2), blocks[0], eps, num_warps=1, **tile,
    )  # fmt: skip
    return *outs, *rstds


def qk_norm_rope_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    interleaved: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.qk_norm_rope_bwd`."""
    batch, tokens, _, width = q.shape
    rows = batch * tokens
    chunk = cdiv(rows, _PROGRAMS) if need_weights else 1
    programs = cdiv(rows, chunk)
    tile = _tile(width, interleaved, cos)
    sides, blocks, grads, sums = [], [], [], []
    for grad, x, weight, rstd in ((grad_q, q, q_weight, q_rstd), (grad_k, k, k_weight, k_rstd)):
        count = 0 if grad is None else cdiv(x.shape[2], tile["HEADS"])
        out = x.new_empty((0,) if grad is None else x.shape)
        parts = None
        weight_grad = (x if weight is None else weight).new_empty(0)
        if need_weights and grad is not None and weight is not None:
            parts = rstd.new_empty((1, programs * count, width))
            weight_grad = weight.new_empty(width)
            sums.append((parts, weight_grad))
        sides.append(Side(_heads(x), _heads(grad), _vector(weight), out, rstd.contiguous(), parts, x.shape[2]))
        blocks.append(count)
        grads.append((out, weight_grad))
    # A side without a gradient has no blocks; what is compiled for it reads the other side's.
    sides = [side if count else sides[1 - index] for index, (side, count) in enumerate(zip(sides, blocks, strict=True))]
    launch(
        qk_norm_rope_bwd_kernel, (programs, sum(blocks)), *sides, _table(cos), _table(sin), tokens, width,
        cdiv(width, 2), *blocks, rows, chunk, num_warps=2, **tile,
    )  # fmt: skip
    sum_chunks(*sums)
    (dq, dq_weight), (dk, dk_weight) = grads
    return dq, dk, dq_weight, dk_weight


def _heads(x: Tensor | None) -> Heads | None:
    if x is None:
        return None
    if x.stride(3) != 1 and x.shape[3] != 1:
        x = x.contiguous()
    return Heads(x, *x.stride()[:3])


def _table(table: Tensor | None) -> Table | None:
    """cos or sin for the kernel; one for the whole batch has a batch stride of 0."""
    if table is None:
        return None
    if table.stride(2) != 1:
        table = table.contiguous()
    return Table(table, 0 if table.shape[0] == 1 else table.stride(0), table.stride(1))


def _vector(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _tile(width: int, interleaved: bool, cos: Tensor | None) -> dict[str, int]:
    """Heads and pairs of a block. Without a rotation neighbours will do (wider reads), or halves for an odd D."""
    block = max(2, next_power_of_2(width))
    neighbours = interleaved if cos is not None else width % 2 == 0
    return {"HEADS": max(1, _BLOCK // block), "PAIRS": block // 2, "INTERLEAVED": neighbours}

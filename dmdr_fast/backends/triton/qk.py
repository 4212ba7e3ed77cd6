"""RMS norm and rotary embedding of queries and keys on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends import at_most
from dmdr_fast.backends.triton.launch import Launches, cdiv, implements, next_power_of_2
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.backends.views import strided, table
from dmdr_fast.kernels.qk_norm_rope import Heads, Side, Table, qk_norm_rope_bwd_kernel, qk_norm_rope_kernel

# Elements of a block of heads: 32 a thread of one warp forward, 16 of two backward.
_BLOCK = 1024
# Programs per block of heads in a backward that sums the weights' gradients.
_PROGRAMS = 256

_refuses = at_most(4096, "features", "heads", lambda a: a.q.shape[-1])


@implements("qk_norm_rope_fwd", refuses=_refuses)
def qk_norm_rope_fwd(run: Launches, a, out) -> None:
    batch, tokens, _, width = a.q.shape
    both = (a.q, a.q_weight, out.q_out, out.q_rstd), (a.k, a.k_weight, out.k_out, out.k_rstd)
    sides = [Side(_heads(x), None, _vector(weight), y, rstd, None, x.shape[2]) for x, weight, y, rstd in both]
    tile = _tile(width, a.interleaved, a.cos)
    blocks = [cdiv(x.shape[2], tile["HEADS"]) for x in (a.q, a.k)]
    run.launch(
        qk_norm_rope_kernel, (batch * tokens, sum(blocks)), *sides, _table(a.cos), _table(a.sin), tokens, width,
        cdiv(width, 2), blocks[0], float(a.eps), num_warps=1, **tile,
    )  # fmt: skip


@implements("qk_norm_rope_bwd", refuses=_refuses)
def qk_norm_rope_bwd(run: Launches, a, out) -> None:
    batch, tokens, _, width = a.q.shape
    rows = batch * tokens
    chunk = cdiv(rows, _PROGRAMS) if a.need_q_weight_or_k_weight else 1
    programs = cdiv(rows, chunk)
    tile = _tile(width, a.interleaved, a.cos)
    sides, blocks, sums = [], [], []
    for grad, x, weight, rstd, grad_x, grad_weight in (
        (a.grad_q_out, a.q, a.q_weight, a.q_rstd, out.grad_q, out.grad_q_weight),
        (a.grad_k_out, a.k, a.k_weight, a.k_rstd, out.grad_k, out.grad_k_weight),
    ):
        count = 0 if grad is None else cdiv(x.shape[2], tile["HEADS"])
        parts = None if grad_weight is None else run.new((1, programs * count, width), torch.float32)
        if parts is not None:
            sums.append((parts, grad_weight))
        sides.append(Side(_heads(x), _heads(grad), _vector(weight), grad_x, rstd.contiguous(), parts, x.shape[2]))
        blocks.append(count)
    # A side without a gradient has no blocks; what is compiled for it reads the other side's.
    sides = [side if count else sides[1 - index] for index, (side, count) in enumerate(zip(sides, blocks, strict=True))]
    run.launch(
        qk_norm_rope_bwd_kernel, (programs, sum(blocks)), *sides, _table(a.cos), _table(a.sin), tokens, width,
        cdiv(width, 2), *blocks, rows, chunk, num_warps=2, **tile,
    )  # fmt: skip
    sum_chunks(run, *sums)


def _heads(x: Tensor | None) -> Heads | None:
    return None if x is None else Heads((heads := strided(x)).tensor, *heads.strides)


def _table(values: Tensor | None) -> Table | None:
    rows = table(values)
    return None if rows is None else Table(rows.tensor, *rows.strides)


def _vector(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _tile(width: int, interleaved: bool, cos: Tensor | None) -> dict[str, int]:
    """Heads and pairs of a block. Without a rotation neighbours will do (wider reads), or halves for an odd D."""
    block = max(2, next_power_of_2(width))
    neighbours = interleaved if cos is not None else width % 2 == 0
    return {"HEADS": max(1, _BLOCK // block), "PAIRS": block // 2, "INTERLEAVED": neighbours}

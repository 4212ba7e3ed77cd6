"""Modulated norms and gated residuals on the Triton kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dmdr_fast.backends.rows import Grouped, mixed
from dmdr_fast.backends.rows import refuses as rows_refuses
from dmdr_fast.backends.triton.launch import Launches, cdiv, implements, next_power_of_2
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.backends.views import broadcast
from dmdr_fast.kernels.gated_residual import gated_residual_bwd_kernel, gated_residual_kernel
from dmdr_fast.kernels.gated_residual_layer_norm_modulate import (
    gated_residual_layer_norm_modulate_bwd_kernel,
    gated_residual_layer_norm_modulate_kernel,
)
from dmdr_fast.kernels.layer_norm_modulate import layer_norm_modulate_bwd_kernel, layer_norm_modulate_kernel
from dmdr_fast.kernels.rows import Pieces, Rows

# A block holds a row: beyond this its registers spill more than they hold.
_LONGEST_ROW = 65536
# Tiles of the kernels without a norm: features, and rows so that a thread of 4 warps has 32 elements.
_TILE = 4096


refuses = functools.partial(rows_refuses, _LONGEST_ROW)


def norm_forward(name: str, kernel: Any, tensors: str) -> None:
    """Register ``kernel``, of one program per row, as the forward ``name``.

    ``tensors`` are its first arguments: x and h have a row of their own for each, all others are vectors.
    """
    vectors = [tensor for tensor in tensors.split() if tensor not in ("x", "h")]

    @implements(name, refuses=refuses("x", *vectors))
    def launch(run: Launches, a, out) -> None:
        g = Grouped(run, a.x, *(getattr(a, vector) for vector in vectors))
        given = [(g.vectors if tensor in vectors else g.rows)(getattr(a, tensor)) for tensor in tensors.split()]
        tile = row_tile(g.width, 64)
        run.launch(kernel, (g.groups * g.tokens,), *map(rows, given), *out, g.tokens, float(a.eps), **tile)


norm_forward("layer_norm_modulate_fwd", layer_norm_modulate_kernel, "x shift scale")
norm_forward(
    "gated_residual_layer_norm_modulate_fwd", gated_residual_layer_norm_modulate_kernel, "x h gate shift scale"
)


@implements("layer_norm_modulate_bwd", refuses=refuses("x", "scale"))
def layer_norm_modulate_bwd(run: Launches, a, out) -> None:
    g = Grouped(run, a.x, a.scale)
    grads = [Gradient(g, a.scale, grad) for grad in (out.grad_shift, out.grad_scale)]
    chunks, chunk = spread(run, g, 512, *grads)
    run.launch(
        layer_norm_modulate_bwd_kernel, (g.groups * chunks,), rows(g.rows(a.grad_y)), rows(g.rows(a.x)),
        rows(g.vectors(a.scale)), a.mean.contiguous(), a.rstd.contiguous(), out.grad_x,
        grads[0].target, grads[1].target, g.tokens, chunks, chunk, PER_TOKEN=grads[0].per_token,
        **row_tile(g.width, 32),
    )  # fmt: skip
    finish(run, *grads)


@implements("gated_residual_fwd", refuses=lambda a: mixed(a.x, a.gate))
def gated_residual_fwd(run: Launches, a, out) -> None:
    g, tile = Grouped(run, a.x, a.gate), _tile(a.x.shape[-1])
    gate = g.vectors(a.gate)
    run.launch(
        gated_residual_kernel, (g.groups * cdiv(g.tokens, tile["ROWS"]), cdiv(g.width, tile["BLOCK"])),
        rows(g.rows(a.x)), rows(g.rows(a.h)), rows(gate), *out, g.tokens, g.width, PER_TOKEN=gate.shape[1] != 1, **tile,
    )  # fmt: skip


@implements("gated_residual_bwd", refuses=lambda a: mixed(a.grad_residual, a.gate))
def gated_residual_bwd(run: Launches, a, out) -> None:
    g, tile = Grouped(run, a.grad_residual, a.gate), _tile(a.h.shape[-1])
    gate, grad_gate = g.vectors(a.gate), Gradient(g, a.gate, out.grad_gate)
    chunks, chunk = spread(run, g, 512, grad_gate)
    if not grad_gate.summed:
        chunks, chunk = cdiv(g.tokens, tile["ROWS"]), tile["ROWS"]
    run.launch(
        gated_residual_bwd_kernel, (g.groups * chunks, cdiv(g.width, tile["BLOCK"])), rows(g.rows(a.grad_residual)),
        rows(g.rows(a.h)), rows(gate), out.grad_h, grad_gate.buffer, g.tokens, g.width, chunks, chunk,
        PER_TOKEN=grad_gate.per_token, GATE_PER_TOKEN=gate.shape[1] != 1, **tile,
    )  # fmt: skip
    finish(run, grad_gate)


@implements("gated_residual_layer_norm_modulate_bwd", refuses=refuses("residual", "gate", "scale"))
def gated_residual_layer_norm_modulate_bwd(run: Launches, a, out) -> None:
    g = Grouped(run, a.residual, a.gate, a.scale)
    grad_gate = Gradient(g, a.gate, out.grad_gate)
    grads = [Gradient(g, a.scale, grad) for grad in (out.grad_shift, out.grad_scale)]
    chunks, chunk = spread(run, g, 384, grad_gate, *grads)  # 3 blocks of 167 registers a multiprocessor
    run.launch(
        gated_residual_layer_norm_modulate_bwd_kernel, (g.groups * chunks,), rows(g.rows(a.grad_residual)),
        rows(g.rows(a.grad_y)), rows(g.rows(a.residual)), rows(g.rows(a.h)), rows(g.vectors(a.gate)),
        rows(g.vectors(a.scale)), a.mean.contiguous(), a.rstd.contiguous(), out.grad_x, out.grad_h,
        grad_gate.target, grads[0].target, grads[1].target, g.tokens, chunks, chunk,
        GATE_PER_TOKEN=grad_gate.per_token, PER_TOKEN=grads[0].per_token, **row_tile(g.width, 24),
    )  # fmt: skip
    finish(run, grad_gate, *grads)


def rows(tensor: Tensor | None) -> Rows | None:
    """[1 or G, 1 or S, D] for the kernels."""
    return None if tensor is None else Rows(tensor, *broadcast(tensor).strides)


class Gradient:
    """The gradient of a vector of :class:`Grouped`, as a kernel writes it and as autograd wants it.

    Attributes:
        per_token: the kernel writes a row per token, not one per chunk of tokens.
        summed: it writes partial sums, which ``finish`` adds up.
        out: the gradient; None if it is not needed.
        buffer: what the kernel writes: ``out``, or float32 partial sums; None if it is not needed.
        parts: the partial sums as [1 or G, C, D] whose sum over dimension 1 is ``out``; None if there are none.
    """

    def __init__(self, g: Grouped, vector: Tensor | None, out: Tensor | None) -> None:
        self._grouped, self.out, self.buffer = g, out, out
        self.parts: Tensor | None = None
        self._lines, tokens, _ = (1, 1, 0) if vector is None else g.vector_shape(vector.shape)
        self.per_token = tokens == g.tokens and self._lines == g.groups
        self.summed = out is not None and not self.per_token

    def sum_in(self, run: Launches, buffer: Tensor) -> None:
        """``buffer`` [G, C, D]: memory for the partial sums."""
        self.buffer, self.parts = buffer, run.part(buffer.view(self._lines, -1, buffer.shape[-1]), buffer)

    @property
    def target(self) -> Rows | None:
        """The buffer as rows of the kernel's programs: a token's, or a chunk's."""
        if self.buffer is None:
            return None
        lines = self._grouped.tokens if self.per_token else self.buffer.shape[1]
        return Rows(self.buffer, lines * self._grouped.width, self._grouped.width)


def finish(run: Launches, *gradients: Gradient) -> None:
    """Add up the partial sums of those that have some."""
    sum_chunks(run, *((one.parts, one.out) for one in gradients if one.parts is not None and one.out is not None))


def spread(run: Launches, g: Grouped, programs: int, *gradients: Gradient) -> tuple[int, int]:
    """(programs per group, tokens of each) for about ``programs`` in all; one token each if nothing is summed.

    Kernels that sum over tokens take as many programs as an H100 runs at once: their partial sums are then 5 % of the
    traffic of 16k tokens. A constant and not the device's number, so that sums have the same order everywhere.
    """
    summed = [gradient for gradient in gradients if gradient.summed]
    if not summed:
        return g.tokens, 1
    chunk = cdiv(g.tokens, max(1, min(g.tokens, programs // g.groups)))
    chunks = cdiv(g.tokens, chunk)
    sums = run.new((len(summed), g.groups, chunks, g.width), torch.float32)  # one allocation: each takes 1 us
    for gradient, buffer in zip(summed, sums, strict=True):
        gradient.sum_in(run, run.part(buffer, sums))
    return chunks, chunk


def row_tile(width: int, most: int) -> dict[str, Any]:
    """The pieces of a row and the fewest warps with at most ``most`` lanes a thread: per thread, sums cost the same.

    1024 threads are the most; beyond ``1024 most`` features each has more lanes.
    """
    first = max(1, next_power_of_2(width) // 2)
    pieces = Pieces(width, first, next_power_of_2(max(1, width - first)))
    warps = next_power_of_2(cdiv(pieces.first + pieces.rest, 32 * most))
    return {"ROW": pieces, "num_warps": min(32, warps)}


def _tile(width: int) -> dict[str, int]:
    """The tile of the kernels without a norm: the widest that divides the features, else the widest."""
    block = max(32, next((size for size in (1024, 512, 256) if width % size == 0), min(1024, next_power_of_2(width))))
    return {"ROWS": min(_TILE // block, 16), "BLOCK": block, "num_warps": 4}

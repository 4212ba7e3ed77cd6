"""Modulated norms and gated residuals on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.rows import Grouped, mixed
from dmdr_fast.backends.triton.launch import Launches, cdiv, implements, next_power_of_2
from dmdr_fast.backends.triton.sums import sum_chunks
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


def refuses(x: str, *vectors: str):
    """Of a raw function whose arguments ``x`` and ``vectors`` are called so."""

    def refusal(a) -> str | None:
        tensor = getattr(a, x)
        if tensor.shape[-1] > _LONGEST_ROW:
            return f"it takes rows of at most {_LONGEST_ROW} features, these have {tensor.shape[-1]}"
        return mixed(tensor, *(getattr(a, name) for name in vectors))

    return refusal


@implements("layer_norm_modulate_fwd", refuses=refuses("x", "shift", "scale"))
def layer_norm_modulate_fwd(run: Launches, a) -> tuple[Tensor, Tensor, Tensor]:
    y = run.new(a.x.shape, a.out_dtype or a.x.dtype)
    mean, rstd = (run.new(a.x.shape[:-1], torch.float32) for _ in range(2))
    g = Grouped(run, a.x, a.shift, a.scale)
    run.launch(
        layer_norm_modulate_kernel, (g.groups * g.tokens,), rows(g.rows(a.x)), rows(g.vectors(a.shift)),
        rows(g.vectors(a.scale)), y, mean, rstd, g.tokens, float(a.eps), **row_tile(g.width, 64),
    )  # fmt: skip
    return y, mean, rstd


@implements("layer_norm_modulate_bwd", refuses=refuses("x", "scale"))
def layer_norm_modulate_bwd(run: Launches, a) -> tuple[Tensor, Tensor, Tensor]:
    g = Grouped(run, a.x, a.scale)
    grad_x = run.new(a.x.shape if a.need_x else (0,), a.x.dtype)
    grads = [Gradient(g, a.scale, dtype, a.need_modulation) for dtype in (a.shift_dtype, a.scale.dtype)]
    chunks, chunk = chunks_of(g, 512 if grads[0].summed else None)
    allocate(run, g, chunks, *grads)
    run.launch(
        layer_norm_modulate_bwd_kernel, (g.groups * chunks,), rows(g.rows(a.grad)), rows(g.rows(a.x)),
        rows(g.vectors(a.scale)), a.mean.contiguous(), a.rstd.contiguous(), grad_x if a.need_x else None,
        grads[0].target, grads[1].target, g.tokens, chunks, chunk, PER_TOKEN=grads[0].per_token,
        **row_tile(g.width, 32),
    )  # fmt: skip
    finish(run, *grads)
    return grad_x, grads[0].out, grads[1].out


@implements("gated_residual_fwd", refuses=lambda a: mixed(a.x, a.gate))
def gated_residual_fwd(run: Launches, a) -> Tensor:
    out = run.new(a.x.shape, a.x.dtype)
    g, tile = Grouped(run, a.x, a.gate), _tile(a.x.shape[-1])
    gate = g.vectors(a.gate)
    run.launch(
        gated_residual_kernel, (g.groups * cdiv(g.tokens, tile["ROWS"]), cdiv(g.width, tile["BLOCK"])),
        rows(g.rows(a.x)), rows(g.rows(a.h)), rows(gate), out, g.tokens, g.width, PER_TOKEN=gate.shape[1] != 1, **tile,
    )  # fmt: skip
    return out


@implements("gated_residual_bwd", refuses=lambda a: mixed(a.grad, a.gate))
def gated_residual_bwd(run: Launches, a) -> tuple[Tensor, Tensor]:
    g, tile = Grouped(run, a.grad, a.gate), _tile(a.grad.shape[-1])
    grad_h = run.new(a.h.shape if a.need_h else (0,), a.h.dtype)
    gate, grad_gate = g.vectors(a.gate), Gradient(g, a.gate, a.gate.dtype, a.need_gate)
    chunks, chunk = cdiv(g.tokens, tile["ROWS"]), tile["ROWS"]
    if grad_gate.summed:
        chunks, chunk = chunks_of(g, 512)
    allocate(run, g, chunks, grad_gate)
    run.launch(
        gated_residual_bwd_kernel, (g.groups * chunks, cdiv(g.width, tile["BLOCK"])), rows(g.rows(a.grad)),
        rows(g.rows(a.h)), rows(gate), grad_h if a.need_h else None, grad_gate.buffer, g.tokens, g.width, chunks, chunk,
        PER_TOKEN=grad_gate.per_token, GATE_PER_TOKEN=gate.shape[1] != 1, **tile,
    )  # fmt: skip
    finish(run, grad_gate)
    return grad_h, grad_gate.out


@implements("gated_residual_layer_norm_modulate_fwd", refuses=refuses("x", "gate", "shift", "scale"))
def gated_residual_layer_norm_modulate_fwd(run: Launches, a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, y = run.new(a.x.shape, a.x.dtype), run.new(a.x.shape, a.out_dtype or a.x.dtype)
    mean, rstd = (run.new(a.x.shape[:-1], torch.float32) for _ in range(2))
    g = Grouped(run, a.x, a.gate, a.shift, a.scale)
    run.launch(
        gated_residual_layer_norm_modulate_kernel, (g.groups * g.tokens,), rows(g.rows(a.x)), rows(g.rows(a.h)),
        *(rows(g.vectors(vector)) for vector in (a.gate, a.shift, a.scale)), residual, y, mean, rstd, g.tokens,
        float(a.eps), **row_tile(g.width, 64),
    )  # fmt: skip
    return residual, y, mean, rstd


@implements("gated_residual_layer_norm_modulate_bwd", refuses=refuses("residual", "gate", "scale"))
def gated_residual_layer_norm_modulate_bwd(run: Launches, a) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = Grouped(run, a.residual, a.gate, a.scale)
    grad_x = run.new(a.residual.shape, a.residual.dtype)
    grad_h = run.new(a.h.shape if a.need_h else (0,), a.h.dtype)
    through_y = a.need_modulation and a.grad_y is not None
    grad_gate = Gradient(g, a.gate, a.gate.dtype, a.need_gate)
    grads = [Gradient(g, a.scale, dtype, through_y) for dtype in (a.shift_dtype, a.scale.dtype)]
    # 3 blocks of 167 registers a multiprocessor
    chunks, chunk = chunks_of(g, 384 if grad_gate.summed or grads[0].summed else None)
    allocate(run, g, chunks, grad_gate, *grads)
    run.launch(
        gated_residual_layer_norm_modulate_bwd_kernel, (g.groups * chunks,), rows(g.rows(a.grad_residual)),
        rows(g.rows(a.grad_y)), rows(g.rows(a.residual)), rows(g.rows(a.h)), rows(g.vectors(a.gate)),
        rows(g.vectors(a.scale)), a.mean.contiguous(), a.rstd.contiguous(), grad_x, grad_h if a.need_h else None,
        grad_gate.target, grads[0].target, grads[1].target, g.tokens, chunks, chunk,
        GATE_PER_TOKEN=grad_gate.per_token, PER_TOKEN=grads[0].per_token, **row_tile(g.width, 24),
    )  # fmt: skip
    finish(run, grad_gate, *grads)
    modulation = grads[0].out, grads[1].out
    if a.need_modulation and a.grad_y is None:  # the kernel had nothing to write
        modulation = tuple(run.filled(a.scale.shape, 0, dtype) for dtype in (a.shift_dtype, a.scale.dtype))
    return grad_x, grad_h, grad_gate.out, *modulation


def rows(tensor: Tensor | None) -> Rows | None:
    """[1 or G, 1 or S, D] for the kernels."""
    if tensor is None:
        return None
    (groups, tokens, _), (group_stride, token_stride, _) = tensor.shape, tensor.stride()
    return Rows(tensor, 0 if groups == 1 else group_stride, 0 if tokens == 1 else token_stride)


class Gradient:
    """The gradient of a vector of :class:`Grouped`, as a kernel writes it and as autograd wants it.

    Attributes:
        per_token: the kernel writes a row per token, not one per chunk of tokens.
        summed: it writes partial sums, which ``_finish`` adds up.
        out: the gradient; an empty [0] if it is not needed.
        buffer: what the kernel writes: ``out``, or float32 partial sums; None if it is not needed.
        parts: the partial sums as [1 or G, C, D] whose sum over dimension 1 is ``out``; None if there are none.
    """

    def __init__(self, g: Grouped, vector: Tensor, dtype: torch.dtype, needed: bool) -> None:
        self._grouped, self._shape, self._dtype, self._needed = g, vector.shape, dtype, needed
        groups, tokens, _ = g.vector_shape(vector.shape)
        self.per_token = tokens == g.tokens and groups == g.groups
        self.summed = needed and not self.per_token
        self._lines = groups

    def allocate(self, run: Launches, sums: Tensor | None) -> None:
        """``sums`` [G, C, D]: memory for the partial sums; None if there are none."""
        self.out = run.new(self._shape if self._needed else (0,), self._dtype)
        self.buffer = self.out if self._needed else None
        self.parts = None
        if sums is not None:
            self.buffer, self.parts = sums, run.part(sums.view(self._lines, -1, sums.shape[-1]), sums)

    @property
    def target(self) -> Rows | None:
        """The buffer as rows of the kernel's programs: a token's, or a chunk's."""
        if self.buffer is None:
            return None
        lines = self._grouped.tokens if self.per_token else self.buffer.shape[1]
        return Rows(self.buffer, lines * self._grouped.width, self._grouped.width)


def allocate(run: Launches, g: Grouped, chunks: int, *gradients: Gradient) -> None:
    """All their tensors; the partial sums lie in one, since an allocation takes 1 us of the host."""
    count = sum(one.summed for one in gradients)
    whole = run.new((count, g.groups, chunks, g.width), torch.float32) if count else ()
    sums = iter(whole)
    for one in gradients:
        one.allocate(run, run.part(next(sums), whole) if one.summed else None)


def finish(run: Launches, *gradients: Gradient) -> None:
    """Add up the partial sums of those that have some."""
    sum_chunks(run, *((one.parts, one.out) for one in gradients if one.parts is not None))


def chunks_of(g: Grouped, programs: int | None) -> tuple[int, int]:
    """(programs per group, tokens of each) for about ``programs`` in all; None: one token each.

    Kernels that sum over tokens take as many programs as an H100 runs at once: their partial sums are then 5 % of the
    traffic of 16k tokens. A constant and not the device's number, so that sums have the same order everywhere.
    """
    if programs is None:
        return g.tokens, 1
    chunk = cdiv(g.tokens, max(1, min(g.tokens, programs // g.groups)))
    return cdiv(g.tokens, chunk), chunk


def row_tile(width: int, most: int) -> dict[str, object]:
    """The pieces of a row and the fewest warps with at most ``most`` lanes a thread: per thread, sums cost the same.

    1024 threads are the most; beyond ``1024 most`` features each has more lanes.
    """
    first = max(1, next_power_of_2(width) // 2)
    pieces = Pieces(width, first, next_power_of_2(max(1, width - first)))
    warps = next_power_of_2(cdiv(pieces.first + pieces.rest, 32 * most))
    return {"ROW": pieces, "num_warps": min(32, warps)}


def _tile(width: int) -> dict[str, int]:
    """The tile of the kernels without a norm: the widest that divides the features, else the widest."""
    block = next((size for size in (1024, 512, 256) if width % size == 0), min(1024, next_power_of_2(width)))
    block = max(block, 32)
    return {"ROWS": min(_TILE // block, 16), "BLOCK": block, "num_warps": 4}

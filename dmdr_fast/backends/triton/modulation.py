"""Rows of [B, T, D] tensors for the kernels, and the gradients of what tokens or samples share."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.triton.launch import cdiv, next_power_of_2
from dmdr_fast.backends.triton.sums import sum_chunks
from dmdr_fast.kernels.rows import Pieces, Rows


def rows(tensor: Tensor | None) -> Rows | None:
    """A tensor [B or 1, T or 1, D] for the kernels; copied only if its last dimension is not contiguous."""
    if tensor is None:
        return None
    if tensor.stride(2) != 1 and tensor.shape[2] != 1:
        tensor = tensor.contiguous()
    (batch, tokens, _), (batch_stride, token_stride, _) = tensor.shape, tensor.stride()
    return Rows(tensor, 0 if batch == 1 else batch_stride, 0 if tokens == 1 else token_stride)


def chunks_of(batch: int, tokens: int, programs: int | None) -> tuple[int, int]:
    """(programs per sample, tokens of each) for about ``programs`` in all; None: one token each.

    Kernels that sum over tokens take as many programs as an H100 runs at once: their partial sums are then 5 % of the
    traffic of 16k tokens. A constant and not the device's number, so that sums have the same order everywhere.
    """
    if programs is None:
        return tokens, 1
    chunk = cdiv(tokens, max(1, min(tokens, programs // batch)))
    return cdiv(tokens, chunk), chunk


class Gradient:
    """The gradient of a modulation tensor [B or 1, T or 1, D], as a kernel writes it and as autograd wants it.

    Attributes:
        out: the gradient; an empty [0] if it is not needed.
        buffer: what the kernel writes: ``out``, or float32 partial sums; None if it is not needed.
        parts: the partial sums as [G, C, D] whose sum over dimension 1 is ``out``; None if there are none.
        per_token: the kernel writes a row per token, not per chunk of tokens.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, full: Tensor, chunks: int, needed: bool) -> None:
        batch, tokens, width = full.shape
        self.out = full.new_empty(shape if needed else (0,), dtype=dtype)
        self.per_token = shape[1] == tokens
        self.buffer = self.parts = None
        if not needed:
            return
        if self.per_token and shape[0] == batch:
            self.buffer = self.out
            return
        lines = tokens if self.per_token else chunks
        self.buffer = full.new_empty((batch, lines, width), dtype=torch.float32)
        if self.per_token:
            self.parts = self.buffer.view(1, batch, tokens * width)
        else:
            self.parts = self.buffer.view(shape[0], -1, width)

    @property
    def target(self) -> Rows | None:
        """The buffer as rows."""
        return None if self.buffer is None else Rows(self.buffer, self.buffer.stride(0), self.buffer.stride(1))


def finish(*gradients: Gradient) -> None:
    """Add up the partial sums of those that have some."""
    sum_chunks(*((one.parts, one.out) for one in gradients if one.parts is not None))


def row_tile(width: int, most: int) -> dict[str, object]:
    """The pieces of a row and the fewest warps with at most ``most`` lanes a thread: per thread, sums cost the same.

    1024 threads are the most; beyond ``1024 most`` features each has more lanes.
    """
    first = max(1, next_power_of_2(width) // 2)
    pieces = Pieces(width, first, next_power_of_2(max(1, width - first)))
    warps = next_power_of_2(cdiv(pieces.first + pieces.rest, 32 * most))
    return {"ROW": pieces, "num_warps": min(32, warps)}

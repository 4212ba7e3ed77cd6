"""LoRA with one scale per sample on the CPU kernels."""

from __future__ import annotations

from torch import Tensor

from dmdr_fast.backends.cpu.library import contiguous_float, kernel, new_float, new_output, pointer, workspace
from dmdr_fast.backends.views import ABSENT, DTYPE_CODE, row_view

_space = workspace("multi_lora", 6)
_fwd = kernel("multi_lora_fwd", "dmdr_multi_lora_args")
_bwd = kernel("multi_lora_bwd", "dmdr_multi_lora_args")


def multi_lora_fwd(x: Tensor, base_out: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.multi_lora_fwd`."""
    out = new_output(base_out.shape, base_out.dtype)
    low_rank = new_float((*x.shape[:-1], A.shape[1]))
    sizes = _sizes(x, A, B)
    space = _space(*sizes, 0)
    a, _a = _matrix(A)
    b, _b = _matrix(B)
    scale = contiguous_float(scale)
    (x, _x), (base, _base), (result, _) = (row_view(_rows(tensor)) for tensor in (x, base_out, out))
    _fwd(
        *sizes, *x, *base, *result, *a, *b, *ABSENT, *ABSENT,
        scale.data_ptr(), low_rank.data_ptr(), 0, 0, space.data_ptr(),
    )  # fmt: skip
    return out, low_rank


def multi_lora_bwd(
    grad: Tensor,
    x: Tensor,
    low_rank: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.multi_lora_bwd`; what a sample of scale 0 holds is not read."""
    sizes = _sizes(x, A, B)
    grad_x = new_output(x.shape, x.dtype) if need_x else x.new_empty(0)
    grad_a = new_float(A.shape if need_a else (0,))
    grad_b = new_float(B.shape if need_b else (0,))
    space = _space(*sizes, 1)
    a, _a = _matrix(A)
    b, _b = _matrix(B)
    scale, low_rank = contiguous_float(scale), low_rank.contiguous()
    (x, _x), (grad, _grad) = row_view(_rows(x)), row_view(_rows(grad))
    result, _ = row_view(_rows(grad_x) if need_x else None)
    _bwd(
        *sizes, *x, *ABSENT, *ABSENT, *a, *b, *grad, *result,
        scale.data_ptr(), low_rank.data_ptr(), pointer(grad_a) if need_a else 0, pointer(grad_b) if need_b else 0,
        space.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_a.to(A.dtype), grad_b.to(B.dtype)


def _sizes(x: Tensor, A: Tensor, B: Tensor) -> tuple[int, int, int, int, int]:
    """batch, rows per sample, in, rank, out."""
    batch, rows = x.shape[0], 1
    for size in x.shape[1:-1]:
        rows *= size
    return batch, rows, A.shape[0], A.shape[1], B.shape[1]


def _rows(tensor: Tensor) -> Tensor:
    """[B, ..., D] as [B, rows, D]; copied only where the strides of the middle dimensions do not merge."""
    if tensor.dim() == 3:
        return tensor
    rows = 1
    for size in tensor.shape[1:-1]:
        rows *= size
    return tensor.reshape(tensor.shape[0], rows, tensor.shape[-1])


def _matrix(matrix: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The ABI's fields of a matrix, and the tensor they point into."""
    if matrix.stride(1) != 1 and matrix.shape[1] != 1:
        matrix = matrix.contiguous()
    return (matrix.data_ptr(), DTYPE_CODE[matrix.dtype], matrix.stride(0), 0, 0, 0, 0), matrix

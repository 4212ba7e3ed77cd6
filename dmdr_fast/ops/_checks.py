"""Argument checks shared by the ops: messages name the op, the argument, what was expected and what came.

Shapes, dtypes, devices and python numbers are always checked. Values inside tensors are checked only where
looking costs no device sync and no graph break: plain CPU tensors outside torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(op: str, name: str, value: Tensor, min_dim: int = 1) -> None:
    """A float tensor with at least ``min_dim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16, float16 or float64, got {_short(value.dtype)}")
    if value.dim() < min_dim:
        raise ValueError(f"{op}: {name}: expected at least {min_dim} dimensions, got shape {list(value.shape)}")


def on_device(op: str, name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name}: expected on {like.device} like {like_name}, got {value.device}")


def like(op: str, name: str, value: Tensor, other: Tensor, other_name: str) -> None:
    """A float tensor with the shape and device of ``other``; the dtype may differ."""
    floating(op, name, value, min_dim=0)
    if value.shape != other.shape:
        raise ValueError(f"{op}: {name}: expected shape {list(other.shape)} like {other_name}, got {list(value.shape)}")
    on_device(op, name, value, other, other_name)


def shaped(op: str, name: str, value: Tensor, shape: Sequence[int], meaning: str, on: Tensor, on_name: str) -> None:
    """A float tensor of exactly ``shape`` (``meaning`` says what its dimensions are)."""
    floating(op, name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name}: expected shape {list(shape)} ({meaning}), got {list(value.shape)}")
    on_device(op, name, value, on, on_name)


def scalar(op: str, name: str, value: Tensor | float, sample: Tensor, dtype: torch.dtype, **bounds: float) -> Tensor:
    """One number per sample, contiguous and of ``dtype``: a python number in ``bounds`` and a 0-d tensor serve all."""
    if not isinstance(value, Tensor):
        return sample.new_full(sample.shape[:1], number(op, name, value, **bounds), dtype=dtype)
    if value.dim() == 0:
        value = value.expand(sample.shape[0])
    if value.dtype is not dtype and value.dtype in _FLOATS:
        value = value.to(dtype)
    return value.contiguous()


def per_sample(
    op: str, name: str, value: Tensor, sample: Tensor, sample_name: str, *, one_for_all: bool = False
) -> None:
    """A float tensor [B], or 0-d where that may serve all."""
    floating(op, name, value, min_dim=0)
    if value.shape != sample.shape[:1] and not (one_for_all and value.dim() == 0):
        raise ValueError(
            f"{op}: {name}: expected a number or shape [{sample.shape[0]}], one value per sample of {sample_name}, "
            f"got {list(value.shape)}"
        )
    on_device(op, name, value, sample, sample_name)


def values(op: str, name: str, value: Tensor | None, **bounds: float) -> None:
    """All finite and in the bounds of :func:`number`; reads them."""
    if value is None or not readable(value):
        return
    numbers = value.tolist() if value.dim() else (value.item(),)  # few: a kernel of torch's takes longer to start
    if math.isnan(sum(numbers)) or not (_in_range(min(numbers), **bounds) and _in_range(max(numbers), **bounds)):
        got = f"values from {value.min():g} to {value.max():g}"  # NaN, if there is one
        raise ValueError(f"{op}: {name}: expected {_range(**bounds)}, got {got}")


def below(op: str, name: str, value: Tensor, bound: Tensor, bound_name: str) -> None:
    """Every value [B] is under its bound [B]."""
    if readable(value) and readable(bound):
        for one, most in zip(value.tolist(), bound.tolist(), strict=True):
            if not one < most:
                got = f"{one:g} against {most:g}"
                raise ValueError(f"{op}: {name}: expected below {bound_name} for every sample, got {got}")


def number(op: str, name: str, value: float, **bounds: float) -> float:
    """A finite python number in the bounds: at least ``minimum``, ``above`` a number, at most ``maximum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name}: expected a number, got {type(value).__name__}")
    if not _in_range(value, **bounds):
        raise ValueError(f"{op}: {name}: expected {_range(**bounds)}, got {value}")
    return value


def _in_range(value: float, *, minimum: float = -math.inf, above: float = -math.inf, maximum: float = math.inf) -> bool:
    """False for NaN and infinities too."""
    return -math.inf < value < math.inf and minimum <= value <= maximum and value > above


def choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def dtype(op: str, name: str, value: torch.dtype) -> None:
    if value not in _FLOATS:
        raise TypeError(f"{op}: {name}: expected a float dtype of torch, got {value!r}")


def seed(op: str, value: Tensor | None, on: Tensor, on_name: str) -> None:
    """int64 [2] = (key, stream) on the device of ``on``."""
    if not isinstance(value, Tensor) or value.dtype is not torch.int64:
        got = _short(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: seed: expected an int64 tensor [2] = (key, stream), got {got}")
    if value.dim() != 1 or value.shape[0] != 2:
        raise ValueError(f"{op}: seed: expected shape [2] = (key, stream), got {list(value.shape)}")
    on_device(op, "seed", value, on, on_name)


def given_or_drawn(op: str, name: str, value: Tensor | None, drawn: Tensor | None, x: Tensor, x_name: str) -> None:
    """Exactly one of a tensor like x and the seed that draws it."""
    if (value is None) == (drawn is None):
        got = "none" if value is None else "both"
        raise ValueError(f"{op}: {name}, seed: expected exactly one of them, got {got}")
    if value is not None:
        like(op, name, value, x, x_name)
    else:
        seed(op, drawn, x, x_name)


def offset(op: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: offset: expected an int (an element index), got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: offset: expected 0 or more, got {value}")


def constant(op: str, name: str, value: Tensor | None) -> None:
    """An input that gets no gradient and no tangent: refuse one that asks for it, silence would train nothing."""
    if not isinstance(value, Tensor):
        return
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name}: expected a constant, got a tensor that requires grad; detach it")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(f"{op}: {name}: expected a constant, got a tensor with a tangent; detach it")


def readable(value: Tensor) -> bool:
    """Reading its values costs neither a sync nor a graph break, and there are some."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.numel() > 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and not torch._C._functorch.is_legacy_batchedtensor(value)
    )


def _range(*, minimum: float = -math.inf, above: float = -math.inf, maximum: float = math.inf) -> str:
    if minimum == above == -math.inf:
        return "a finite number"
    lower = f"above {above:g}" if above > -math.inf else f"of at least {minimum:g}"
    return f"a finite number {lower}" + (f" and at most {maximum:g}" if maximum < math.inf else "")


def _short(value: torch.dtype) -> str:
    return str(value).removeprefix("torch.")

"""What is measured: one op at one size and dtype, with its eager counterpart and its floor in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmdr_fast import ops

DTYPES = (torch.bfloat16, torch.float32)

LATENTS = (8, 16, 128, 128)  # SD3.5 at 1024 pixels
TOKENS = (4, 4096, 1536)  # and its transformer's
VIDEO_LATENTS = (8, 16, 21, 60, 104)  # five seconds at 480p: what fills a GPU's bandwidth


@dataclass(frozen=True)
class Inputs:
    """A source of random inputs: all normal (or uniform where the op asks for a range), never zeros."""

    dtype: torch.dtype
    device: torch.device
    rng: torch.Generator

    @classmethod
    def seeded(cls, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return cls(dtype, device, torch.Generator(device).manual_seed(seed))

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1) in the case's dtype."""
        return torch.randn(shape, generator=self.rng, device=self.device).to(self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """U(low, high) in float32, as per-sample scalars are."""
        return low + (high - low) * torch.rand(shape, generator=self.rng, device=self.device)

    def seed(self) -> Tensor:
        """int64 [2] for ``ops.renoise`` and its like."""
        return torch.randint(2**62, (2,), generator=self.rng, device=self.device)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        op: public name in ``dmdr_fast.ops``.
        shape: of the largest input; printed.
        dtype: of the tensors that :class:`Inputs` draws.
        tensors: draws the op's tensor arguments, by name.
        eager: the same call in eager PyTorch, as a trainer writes it: broadcasts and autograd, in the dtype of the
            tensors. Same keywords, same outputs; a baseline, not a truth: the gate compares with float64.
        forward_bytes, backward_bytes: the floor: every large tensor read once and written once.
        wrt: arguments that get a gradient. Empty: forward only.
        options: the other keyword arguments.
        outputs: fields to take of a named tuple, what the gate compares and the backward starts from.
        variant: what distinguishes two cases of one op.
        own_noise: eager draws other random numbers, so the gate has its ceiling only.
        ceiling: relative L2 error that the gate allows at most in float32, where it is not the design's 1e-5.
        note: why it may be slower than an alternative; printed where it is.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: Callable[[Inputs], Mapping[str, Tensor]]
    eager: Callable[..., Any]
    forward_bytes: int
    backward_bytes: int = 0
    wrt: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("out",)
    variant: str = ""
    own_noise: bool = False
    ceiling: float = 1e-5
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.op} ({self.variant})" if self.variant else self.op

    def fused(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """The op itself, on the backend that ``DMDR_FAST_BACKEND`` asks for."""
        return self.select(getattr(ops, self.op)(**tensors, **self.options))

    def plain(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """Its eager counterpart."""
        return self.select(self.eager(**tensors, **self.options))

    def select(self, result: Any) -> tuple[Tensor, ...]:
        """The compared outputs of what the op or its counterpart returned."""
        if isinstance(result, Tensor):
            return (result,)
        if hasattr(result, "_fields"):
            return tuple(getattr(result, name) for name in self.outputs)
        return tuple(result)

    def draw(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """One set of inputs, those in ``wrt`` requiring grad."""
        tensors = dict(self.tensors(Inputs.seeded(self.dtype, device, seed)))
        for name in self.wrt:
            tensors[name].requires_grad_()
        return tensors


def tensor_bytes(passes: float, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that ``passes`` reads or writes of a tensor move."""
    return round(passes * math.prod(shape) * dtype.itemsize)


def latent_shapes() -> tuple[tuple[int, ...], ...]:
    """The latents to measure: on a GPU also a video's, SD3.5's are gone in a few microseconds there."""
    return (LATENTS, VIDEO_LATENTS) if torch.cuda.is_available() else (LATENTS,)


def per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """A scalar per sample in the tensors' dtype, broadcast."""
    return scalar.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def upstream(outputs: tuple[Tensor, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Incoming gradients: normal and rounded to ``dtype`` like the inputs, whatever the outputs' own; 1 for a loss."""
    rng = torch.Generator(outputs[0].device).manual_seed(seed)
    return tuple(
        torch.ones_like(out)
        if out.dim() == 0
        else torch.randn(out.shape, generator=rng, device=out.device).to(dtype).to(out.dtype)
        for out in outputs
    )

"""Random calls of every op: shapes, ranks, dtypes and their mixtures, memory layouts, variants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import DTYPES, OPS

LAYOUTS = ("contiguous", "window", "permuted", "scattered")


@dataclass(frozen=True)
class Case:
    """``ops.<op>(**tensors, **options)``.

    Attributes:
        dtype: of all latents, tokens or images; None where they differ.
        wrt: the tensors that get a gradient.
    """

    op: str
    dtype: torch.dtype | None
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    wrt: tuple[str, ...]

    def __repr__(self) -> str:
        shapes = [f"{name}={t.dtype}{list(t.shape)} strides {t.stride()}" for name, t in self.tensors.items()]
        return f"{self.op}({', '.join(shapes)}, {self.options})"


class Choices:
    """The choices of one call, and its numbers."""

    def __init__(self, draw: Callable) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from((*DTYPES, None)))
        self.layout = draw(st.sampled_from(LAYOUTS))
        self._rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def size(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def batch(self) -> int:
        return self.one_of(2, 3, 1, 0)

    def latent_shape(self) -> tuple[int, ...]:
        """[B, ...], 3-D to 6-D."""
        rank = self.size(2, 5)
        return (self.batch(), *(self.size(1, 9 if rank < 4 else 5) for _ in range(rank)))

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1) in the call's dtype and layout; what lies around a view is NaN."""
        dtype = self.dtype or DTYPES[int(torch.randint(3, (1,), generator=self._rng))]
        values = torch.randn(shape, generator=self._rng).to(dtype)
        if self.layout == "window":
            wider = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)
            wider[..., 1 : shape[-1] + 1] = values
            return wider[..., 1 : shape[-1] + 1]
        if self.layout == "permuted" and len(shape) > 2:
            return values.transpose(0, -2).contiguous().transpose(0, -2)
        if self.layout == "scattered" and len(shape) > 1:
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        return values

    def uniform(self, low: float, high: float, batch: int) -> Tensor:
        """U(low, high) in float32, one per sample."""
        return low + (high - low) * torch.rand(batch, generator=self._rng)

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """Selects something of every sample."""
        mask = torch.rand((shape[0], *[1] * (len(shape) - 2), shape[-1]), generator=self._rng) > 0.4
        mask[..., 0] = True
        return mask

    def token_shape(self) -> tuple[int, int, int]:
        return self.batch(), self.size(1, 6), self.size(9, 40)  # in a narrower row a norm's gradient is a cancellation

    def modulations(self, shape: tuple[int, ...], count: int) -> list[Tensor]:
        """Vectors of one layout, that of a random choice of x's dimensions."""
        batch, tokens, width = shape
        layout = self.one_of((batch, width), (width,), (batch, 1, width), (batch, tokens, width))
        return [self.normal(*layout) for _ in range(count)]

    def case(self, op: str, tensors: dict[str, Tensor | None], **options: Any) -> Case:
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return Case(op, self.dtype, given, options, tuple(name for name in OPS[op].wrt.split() if name in given))


@st.composite
def cases(draw: Callable, op: str) -> Case:
    return OPS[op].sweep(Choices(draw))

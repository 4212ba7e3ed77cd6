"""Token tensors as rows: [B, ..., D] as [G, S, D], and the vectors that rows share as [1 or G, 1 or S, D].

A group is a sample, or the tokens of a frame where vectors are given per frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dmdr_fast.backends import at_most
from dmdr_fast.backends.plans import Recorder


def depth_of(shape: Sequence[int], x_shape: Sequence[int]) -> int:
    """How many leading dimensions of x [B, ..., D] a vector differs along: 0 for [D], 1 for one per sample, and so on.

    ``shape``: [D], [B, D] or x's number of dimensions: x's sizes up to the depth, then ones, then D.
    """
    depth = len(shape) - 1
    while depth > 1 and shape[depth - 1] == 1 != x_shape[depth - 1]:
        depth -= 1
    return depth


def _depths(x: Tensor, vectors: Sequence[Tensor | None]) -> set[int]:
    """Of the vectors that neither all rows share nor each row has one of its own."""
    return {depth_of(vector.shape, x.shape) for vector in vectors if vector is not None} - {0, x.dim() - 1}


def mixed(x: Tensor, *vectors: Tensor | None) -> str | None:
    """Why the vectors of one call have no grouping in common; None where they have."""
    several = len(_depths(x, vectors)) > 1
    return "it takes vectors per frame beside vectors per sample or token of one kind only" if several else None


def refuses(longest: float, x: str, *vectors: str) -> Callable[[Any], str | None]:
    """Why rows of the argument ``x`` are longer than ``longest``, or do not go with the vectors; None where they do."""
    too_long = at_most(longest, "features", "rows", lambda a: getattr(a, x).shape[-1])
    return lambda a: too_long(a) or mixed(getattr(a, x), *(getattr(a, name) for name in vectors))


def matrix(run: Recorder, tensor: Tensor) -> Tensor:
    """[..., D] as [R, D] with contiguous rows."""
    return run.view(tensor, math.prod(tensor.shape[:-1]), tensor.shape[-1])


def halves(run: Recorder, packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(value, gate) of a packed matrix, views."""
    first, second = (run.part(half, packed) for half in packed.chunk(2, 1))
    return (second, first) if gate_first else (first, second)


class Grouped:
    """Tensors of one call as rows.

    Attributes:
        groups, tokens, width: G, S, D.
    """

    def __init__(self, run: Recorder, x: Tensor, *vectors: Tensor | None) -> None:
        self._run, self._shape = run, x.shape
        self.depth = max(_depths(x, vectors), default=1)
        self.groups, self.width = math.prod(x.shape[: self.depth]), x.shape[-1]
        self.tokens = math.prod(x.shape[self.depth : -1])

    def rows(self, tensor: Tensor | None) -> Any:
        """A tensor of x's shape as [G, S, D], copied where its strides do not merge; None as it is."""
        return None if tensor is None else self._run.view(tensor, self.groups, self.tokens, self.width)

    def vectors(self, tensor: Tensor | None) -> Any:
        """A vector as [1 or G, 1 or S, D]; None as it is."""
        return None if tensor is None else self._run.view(tensor, *self.vector_shape(tensor.shape))

    def vector_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        depth = depth_of(shape, self._shape)
        if depth == 0:
            return 1, 1, self.width
        return self.groups, 1 if depth == self.depth else self.tokens, self.width

"""What a file of cases says of its ops, and the random tensors that its calls are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmdr_fast import ops

if TYPE_CHECKING:
    from tests.ops.sweep import Case, Choices
    from tests.raw import RawFunctions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([-3, 1 << 40])


@dataclass(frozen=True)
class Op:
    """A public op.

    Attributes:
        valid: of ``draw(*shape)``, which has the dtype of latents: the keyword arguments of a valid call, three samples
            or two, which a test may change one at a time.
        formula: in plain PyTorch, written apart from the reference: in float64 the truth, in the dtype of a call what
            eager PyTorch makes of it. Keywords are the op's; the results come as a tuple. Where the op goes on with a
            result that it has rounded, ``kept`` is that result: values start from it, gradients do not see it.
        sweep: a random call: shape, dtypes, layout, variant.
        wrong: (what is changed in the valid call, what the message says of it) each.
        wrt: the arguments with a derivative.
        constants: the arguments that must have none.
        variants: by label, changes of the valid call that take another way.
        outputs: how many of the results have a gradient; None means all.
        keeps: the formula has ``kept``.
        vectors: those of the arguments that modulate x [B, ..., D].
        twice: it has second derivatives.
        host: of :class:`Sizes`, calls whose host time is bounded, by label.
        rows: its kernels hold rows of tokens.
    """

    valid: Callable[[Callable[..., Tensor]], dict[str, Any]]
    formula: Callable[..., tuple[Tensor, ...]]
    sweep: Callable[[Choices], Case]
    wrong: Callable[[], Iterator[tuple[dict[str, Any], str]]]
    wrt: str = ""
    constants: str = ""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: int | None = None
    keeps: bool = False
    vectors: str = ""
    twice: bool = True
    host: Callable[[Sizes], dict[str, HostCall]] = lambda sizes: {}
    rows: bool = False


@dataclass(frozen=True)
class Raw:
    """Raw functions of one file.

    Attributes:
        calls: of a :class:`Draw`: calls of each on odd, empty, strided shapes and every variant.
        small: the same for Triton's interpreter, which takes milliseconds for a block.
        large: calls with more elements than a kernel of the CPU runs on one thread.
        compiled: calls at a size that is used, in bfloat16, whose Triton kernels are compiled for a GPU, by label.
        instructions: the most per element that a kernel may take: an H100 has 9.5 for each byte at 3 TB/s, an H200 6.6
            at 4.3 TB/s.
        exact: by function whose later results are computed of its rounded first one, their truth:
            ``exact(reference, wide arguments, results)``.
        ceilings: relative L2 errors allowed in float32, by function, where they are larger than the others'.
    """

    calls: Callable[[Draw], Iterable[Call]]
    small: Callable[[Draw], Iterable[Call]]
    large: Callable[[], Iterable[Call]] = tuple
    compiled: Callable[[], dict[str, Compiled]] = dict
    instructions: dict[str, int] = field(default_factory=dict)
    exact: dict[str, Callable[[RawFunctions, list, tuple[Tensor, ...]], tuple[Tensor, ...]]] = field(
        default_factory=dict
    )
    ceilings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """``name(*args)`` of a backend, and a label for the test's id."""

    name: str
    label: str
    args: tuple

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"


@dataclass(frozen=True)
class HostCall:
    """A call whose host time is bounded.

    Attributes:
        call: forward.
        wrt: what gets a gradient.
        launches: of kernels, forward and with the backward; None where they are not held.
    """

    call: Callable[[], Any]
    wrt: list[Tensor] = field(default_factory=list)
    launches: list[int] | None = None


@dataclass(frozen=True)
class Sizes:
    """Tokens of a transformer, x [batch, tokens, width]; ``heads`` heads. For the host's time they may be small."""

    batch: int = 2
    tokens: int = 64
    width: int = 256
    heads: int = 4

    def x(self) -> Tensor:
        return leaf(self.batch, self.tokens, self.width)

    def vector(self) -> Tensor:
        """One row per sample."""
        return leaf(self.batch, 1, self.width)


def leaf(*shape: int) -> Tensor:
    """Normal numbers in bfloat16 that require a gradient."""
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


@dataclass(frozen=True)
class Compiled:
    """A call that is compiled for a GPU.

    Attributes:
        name, args: the raw function, and its arguments on meta tensors.
        elements: by kernel, those that one block handles at a time. A kernel that is left out is a second stage: sums,
            scalars, tables.
        launches: how many; None where they are not held.
        before: forgets what the first call of a process keeps.
    """

    name: str
    args: tuple
    elements: dict[str, int]
    launches: int | None = None
    before: Callable[[], object] = lambda: None


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Draw:
    """Random tensors of one dtype, contiguous or as strided views of larger ones, or of mixed dtypes (None)."""

    def __init__(self, dtype: torch.dtype | None, strided: bool) -> None:
        self._dtype, self._strided = dtype, strided
        self._generator = torch.Generator().manual_seed(0)
        self._drawn = 0

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self._drawn += 1
        dtype = dtype or self._dtype or DTYPES[self._drawn % 3]
        values = torch.randn(shape, generator=self._generator).to(dtype)
        if not self._strided or not shape:
            return values
        # NaN around the view: what must not be read shows.
        wider = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)
        wider[..., 1 : shape[-1] + 1] = values
        return wider[..., 1 : shape[-1] + 1]

    def per_sample(self, batch: int, low: float = 0.05, high: float = 0.95) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=self._generator)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator) > 0.4

    def bits(self, *shape: int) -> Tensor:
        """Bytes."""
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self._generator)


# Latents of odd, empty and large shapes, of many dimensions and one.
LATENTS = (
    (3, 5),
    (1, 7),
    (2, 3, 5, 7),
    (1, 4, 2, 9, 11),
    (0, 4, 4),
    (2, 0),
    (2, 16, 33, 33),
    (5, 1, 1, 1, 1, 3),
)
_TOKENS = ((2, 5, 33), (1, 1, 8), (3, 130, 64), (0, 4, 16), (2, 3, 1040))

Shape = tuple[int, ...]


def token_layouts(small: bool) -> Iterator[tuple[str, Shape, Shape]]:
    """(label, shape of x, shape of a vector): one for all, per sample, per token, per frame."""
    for batch, rows, features in ((2, 5, 33),) if small else _TOKENS:
        x = (batch, rows, features)
        frame = 3 if small else rows
        for full, vector in (
            (x, (features,)),
            (x, (batch, features)),
            (x, x),
            ((batch, 2, frame, features), (batch, 2, 1, features)),
        ):
            yield f"{list(full)}-by-{list(vector)}", full, vector


def statistics(draw: Draw, x: Shape) -> tuple[Tensor, Tensor]:
    """mean and rstd of rows."""
    return draw(*x[:-1], dtype=torch.float32), draw.per_sample(math.prod(x[:-1])).view(x[:-1])


def large_tokens(count: int) -> list[Tensor]:
    return [torch.randn(2, 200, 160) for _ in range(count)]


def row_sizes() -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """(label, x, a vector, [D], a statistic per row) of SiT-XL, SD3, SD3.5, FLUX and Z-Image: each width fills the two
    pieces of its rows otherwise. The last has a vector per token."""
    for width in (1152, 1536, 2432, 3072, 3840):
        x = meta(4, 4096, width)
        yield f"{width} features", x, meta(4, 1, width), meta(width), meta(4, 4096, dtype=torch.float32)
    x = meta(4, 4096, 1536)
    yield "modulation per token", x, x, meta(1536), meta(4, 4096, dtype=torch.float32)


def of_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """[B] beside [B, ...], for formulas."""
    return scalar.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def of_token(modulation: Tensor, x: Tensor) -> Tensor:
    """[D], [B, D], and what broadcasts beside x [B, ..., D] as it is, for formulas."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def stream(like: Tensor, seed: Tensor) -> Tensor:
    """The seeded noise, which has tests of its own."""
    return ops.normal_noise(like.double(), seed).to(like.dtype)

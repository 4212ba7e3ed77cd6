"""Arguments made wrong, one at a time: (what is changed in a valid call, what the message says of it)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

Wrong = Iterator[tuple[dict[str, Any], str]]

NAN, INF = math.nan, math.inf
FLOAT_TYPES = "expected float32, bfloat16, float16 or float64, got int64"
INTEGERS = torch.zeros(3, 4, 5, dtype=torch.int64)


def one_bad(value: float) -> torch.Tensor:
    """A tensor [3] with it in the middle, where Python's min and max may pass over a NaN."""
    return torch.tensor([0.25, value, 0.125])


def latents(*names: str) -> Wrong:
    for name in names:
        yield {name: torch.randn(3, 4, 6)}, rf"{name}: expected shape \[3, 4, 5\] like \w+, got \[3, 4, 6\]"
        yield {name: torch.randn(2, 4, 5)}, rf"{name}: expected shape \[3, 4, 5\] like \w+, got \[2, 4, 5\]"
        yield {name: INTEGERS}, f"{name}: {FLOAT_TYPES}"
        yield {name: 1.0}, f"{name}: expected a tensor, got float"
        yield {name: torch.empty(3, 4, 5, device="meta")}, f"{name}: expected on cpu like .*, got meta"


def scalars(name: str, minimum: float | None = None) -> Wrong:
    yield {name: torch.rand(4)}, rf"{name}: expected a number or shape \[3\].* got \[4\]"
    yield {name: torch.rand(3, 1)}, rf"{name}: expected a number or shape \[3\].* got \[3, 1\]"
    yield {name: "1"}, f"{name}: expected a number, got str"
    yield {name: torch.tensor([1, 1, 1])}, f"{name}: {FLOAT_TYPES}"
    for bad in (NAN, INF, -INF):
        yield {name: bad}, f"{name}: expected a finite number.*, got {bad}"
        yield {name: one_bad(bad)}, f"{name}: expected a finite number.*, got values from .*{bad}"
    if minimum is not None:
        for below in (minimum - 1.0, one_bad(minimum - 1.0)):
            yield {name: below}, f"{name}: expected a finite number of at least {minimum}"


def numbers(name: str, *bad: float) -> Wrong:
    yield {name: "1"}, f"{name}: expected a number, got str"
    yield {name: torch.tensor(1.0)}, f"{name}: expected a number, got Tensor"
    for value in (NAN, INF, *bad):
        yield {name: value}, f"{name}: expected a finite number.*, got {value}"


def seeds(**without: None) -> Wrong:
    on_meta = torch.empty(2, dtype=torch.int64, device="meta")
    yield {**without, "seed": torch.tensor([1.0, 2.0])}, "seed: expected an int64 tensor .* got float32"
    yield {**without, "seed": (1, 2)}, "seed: expected an int64 tensor .* got tuple"
    yield {**without, "seed": torch.tensor([1, 2, 3])}, r"seed: expected shape \[2\].* got \[3\]"
    yield {**without, "seed": on_meta}, "seed: expected on cpu .* meta"
    yield {"offset": -1}, "offset: expected 0 or more, got -1"
    yield {"offset": 1.0}, "offset: expected an int .* got float"


def noise_or_seed(given: str) -> Wrong:
    yield {given: None}, f"{given}, seed: expected exactly one of them, got none"
    yield {"seed": torch.tensor([1, 2])}, f"{given}, seed: expected exactly one of them, got both"


def modulations(*names: str) -> Wrong:
    for name in names:
        for shape in ((9,), (2, 8), (3, 4, 9), (3, 2, 8)):
            yield (
                {name: torch.randn(shape)},
                rf"{name}: expected shape \[8\], \[3, 8\], \[3, 1, 8\] or x's \[3, 4, 8\], got ",
            )
        yield {name: torch.ones(8, dtype=torch.int64)}, f"{name}: {FLOAT_TYPES}"


def tokens() -> Wrong:
    yield {"x": torch.randn(8)}, "x: expected at least 2 dimensions"


def out_dtypes() -> Wrong:
    yield {"out_dtype": "bfloat16"}, "out_dtype: expected a float dtype of torch, got 'bfloat16'"


def branches() -> Wrong:
    """h and gate of a gated residual."""
    yield {"h": torch.randn(3, 4, 9)}, r"h: expected shape \[3, 4, 8\] like x, got \[3, 4, 9\]"
    yield from modulations("gate")


def shift_and_scale() -> Wrong:
    yield from modulations("shift", "scale")
    yield {"scale": torch.randn(8)}, "scale: expected one per sample like shift, got one per batch"


def weights() -> Wrong:
    yield {"weight": torch.randn(7)}, r"weight: expected shape \[8\] \(D\), got \[7\]"
    yield {"weight": INTEGERS[0, 0]}, f"weight: {FLOAT_TYPES}"

"""docs/drop-in.md: every formula and the call beside it give the same gradient."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_fast import ops

PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text()
FENCE = re.compile(r"```python\n(.*?)```", re.S)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
CEILING = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}  # relative L2, the ops' own


def _pairs() -> dict[str, tuple[str, str]]:
    """Section title -> (formula, call)."""
    text = PAGE.split("## The DMD loss of other trainers")[1].split("\n## ")[0]
    sections = {section.partition("\n")[0]: FENCE.findall(section) for section in text.split("\n### ")[1:]}
    return {title: tuple(blocks) for title, blocks in sections.items()}


def _computes_in() -> dict[str, torch.dtype]:
    """Section title -> the dtype that the page's table gives."""
    rows = re.findall(r"^\| (.+?) \| `.*\| (fp16|bf16|fp32|fp64) \|$", PAGE, re.M)
    names = {re.sub(r"\[(\w+)\]\(.*?\)", r"\1", name): DTYPES[dtype] for name, dtype in rows}
    return {title: next(names[name] for name in names if name.startswith(title)) for title in PAIRS}


PAIRS = _pairs()
COMPUTES_IN = _computes_in()
DENOISED = {title: 'prediction="x0"' in call for title, (_, call) in PAIRS.items()}


def latents(title: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | float]:
    """Tensors for the names that the page uses; |g| is a twentieth of |x0|, as in training."""
    shape = (3, 4, 2, 5, 6) if "FastVideo" in title or title == "rCM" else (3, 4, 5, 6)

    def normal() -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    cond, difference = normal(), 0.3 * normal()
    named = {
        "x0": normal(),
        "x_t": normal(),
        "cond": cond,
        "uncond": cond - difference,
        "fake": cond + 2.5 * difference + 0.05 * normal(),
    }
    found = {name: value.to(dtype) for name, value in named.items()}
    scalars = torch.float64 if dtype is torch.float64 else torch.float32
    found |= {"t": t.to(scalars), "alphas_cumprod": (1 - t).square().to(scalars), "w": 3.5}
    found["frames"] = torch.tensor([[False, True, True, True]] * 2 + [[False, False, True, True]])
    return found


def gradient(code: str, names: dict) -> tuple[Tensor, Tensor]:
    """(gradient of x0, value) of the loss that a block computes."""
    names = dict(names, torch=torch, F=F, ops=ops)
    names["x0"] = names["x0"].clone().requires_grad_()
    exec(code, names)
    names["loss"].backward()
    return names["x0"].grad, names["loss"].detach()


def test_the_page_has_a_pair_for_every_code_base():
    assert list(PAIRS) == [
        "DMDR",
        "DMD2",
        "FastGen",
        "FastVideo, new",
        "FastVideo, legacy",
        "FastVideo, streaming",
        "SenseFlow",
        "RTDMD",
        "rCM",
    ]
    for formula, call in PAIRS.values():
        assert "ops." not in formula and "ops.dmd_" in call


@pytest.mark.parametrize("title", PAIRS)
def test_same_gradient_in_float64(title):
    """The second sample is nearly denoised, so that what is added to or clamps the normaliser counts."""
    torch.manual_seed(0)
    names = latents(title)
    real = names["x0"][1] + 2e-6 * torch.randn_like(names["x0"][1])
    if not DENOISED[title]:
        alpha = (1 - names["t"][1]) if title == "DMD2" else 1.0
        sigma = (1 - alpha**2) ** 0.5 if title == "DMD2" else names["t"][1]
        real = (names["x_t"][1] - alpha * real) / sigma
    names["cond"][1] = names["uncond"][1] = real
    formula, value = gradient(PAIRS[title][0], names)
    call, call_value = gradient(PAIRS[title][1], names)
    assert formula.isfinite().all()
    torch.testing.assert_close(call, formula, rtol=1e-6, atol=1e-9 * float(formula.abs().max()))
    if title != "FastVideo, streaming":  # its call has the gradient only, and says so
        torch.testing.assert_close(call_value, value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("title", PAIRS)
def test_same_gradient_in_its_own_dtype(title):
    """The call is within the dtype's tolerance of the formula in float64; their rounding is no better."""
    torch.manual_seed(0)
    dtype = COMPUTES_IN[title]
    inputs = torch.float32 if dtype is torch.float64 else dtype  # those that compute in fp64 get fp32 latents
    names = latents(title, inputs)
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in names.items()
    }
    truth, _ = gradient(PAIRS[title][0], wide)
    errors = [float((gradient(code, names)[0].double() - truth).norm() / truth.norm()) for code in PAIRS[title]]
    assert errors[1] <= CEILING[inputs]
    if inputs in (torch.float16, torch.bfloat16):
        assert errors[1] < errors[0]


@pytest.mark.parametrize("title", PAIRS)
def test_same_gradient_where_a_network_overflowed(title):
    torch.manual_seed(0)
    names = latents(title)
    names["cond"][0, 1, 1, 1] = torch.nan
    if title not in ("rCM", "FastVideo, streaming"):  # there autograd makes it infinite again, squaring
        names["fake"][1, 1, 1, 1] = torch.inf
    formula, call = (gradient(code, names)[0] for code in PAIRS[title])
    if title == "rCM":
        assert formula[0].isnan().any()  # as the page says
        formula = formula.nan_to_num()
    torch.testing.assert_close(call, formula, rtol=1e-6, atol=1e-12, equal_nan=True)

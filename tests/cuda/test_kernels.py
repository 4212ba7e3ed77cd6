"""Every raw function of the CUDA backend against the reference in float64, twice with the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.native.calls import DTYPES, calls
from tests.native.test_accuracy import exact, relative_error
from tests.raw import RawFunctions, as_tuple

reference = RawFunctions(None)

# Relative L2 against float64: the rounding of the output, and float32 arithmetic before it.
CEILING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Bicubic weights come from a filter centre in float32, as PyTorch's do: an ulp of a position of 600 is 6e-5.
RESIZE_CEILING = {**CEILING, torch.float32: 5e-5}


# Strided rows and mixed dtypes run in one instance of a kernel, contiguous tensors in one for each dtype.
@pytest.mark.parametrize(
    ("dtype", "strided"),
    [*[(dtype, False) for dtype in DTYPES], (torch.bfloat16, True), (None, True)],
    ids=["fp32", "bf16", "fp16", "bf16-strided", "mixed-strided"],
)
def test_agrees_with_the_formula_in_float64(kernels, dtype, strided):
    seen = set()
    for call in calls(dtype, strided):
        if call.name not in kernels.functions.names:
            continue
        seen.add(call.name)
        if kernels.functions.supports(call.name, *call.args) is not None:
            continue
        results = kernels(call.name, *call.args)
        if kernels.emulated:
            kernels.configure(reversed_order=True)
        again = kernels(call.name, *call.args)
        if kernels.emulated:
            kernels.configure()
        plain = as_tuple(getattr(reference, call.name)(*call.args))
        ceiling = RESIZE_CEILING if call.name.startswith("preprocess") else CEILING
        truths = exact(call, results)
        for index, (value, same, like, truth) in enumerate(zip(results, again, plain, truths, strict=True)):
            where = f"{call}[{index}]"
            assert value.dtype is like.dtype and value.shape == like.shape and value.is_contiguous(), where
            torch.testing.assert_close(same, value, rtol=0, atol=0, equal_nan=True, msg=where)
            if not value.is_floating_point():
                assert torch.equal(value, like), where
            elif value.numel():
                assert relative_error(value, truth) < ceiling[value.dtype], where
    assert seen == set(kernels.functions.names)

"""Every raw function of the CUDA backend against the reference in float64, twice with the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.cases import DTYPES, calls
from tests.raw import RawFunctions, as_tuple
from tests.tiers import sampled
from tests.truth import exact, largest_error, relative_error

reference = RawFunctions(None)

# Relative L2 against float64: the rounding of the output, and float32 arithmetic before it.
CEILING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


# Strided rows and mixed dtypes run in one instance of a kernel, contiguous tensors in one for each dtype.
@pytest.mark.parametrize(
    ("dtype", "strided"),
    sampled([(None, True), *[(dtype, False) for dtype in DTYPES], (torch.bfloat16, True)]),
    ids=["mixed-strided", "fp32", "bf16", "fp16", "bf16-strided"],
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
        truths = exact(call, results)
        for index, (value, same, like, truth) in enumerate(zip(results, again, plain, truths, strict=True)):
            where = f"{call}[{index}]"
            assert value.dtype is like.dtype and value.shape == like.shape and value.is_contiguous(), where
            torch.testing.assert_close(same, value, rtol=0, atol=0, equal_nan=True, msg=where)
            if not value.is_floating_point():
                assert torch.equal(value, like), where
            elif value.numel():
                assert relative_error(value, truth) < largest_error(call, value.dtype, CEILING), where
    assert seen == set(kernels.functions.names)

"""What a raw function's results are compared with, and how close they have to be."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import Call
from tests.kernels.conftest import INTERPRETED
from tests.raw import as_tuple
from tests.truth import exact, largest_error, reference, relative_error

# Relative L2 against float64, as in the design. Triton's interpreter truncates where it rounds to bfloat16.
_CEILING = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 1e-3}
# Below this, twice the reference's own error says nothing: a result of one element may be rounded exactly by luck.
_FLOOR = {torch.float32: 5e-7, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}


def moved(call: Call, device: torch.device) -> tuple:
    """The call's arguments on ``device``, with their strides."""
    return tuple(_moved(arg, device) if isinstance(arg, Tensor) else arg for arg in call.args)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check(call: Call, results: tuple[Tensor, ...]) -> None:
    """Shapes and dtypes are the reference's; errors against float64 at most twice its own, and under the ceilings."""
    results = tuple(result.cpu() for result in results)
    plain = as_tuple(reference(call.name, *call.args))
    assert len(results) == len(plain)
    for index, (value, own, truth) in enumerate(zip(results, plain, exact(call, results), strict=True)):
        where = f"{call}[{index}]"
        assert value.dtype is own.dtype and value.shape == own.shape, where
        assert value.is_contiguous(), where
        if not value.is_floating_point():
            assert torch.equal(value, own), where
        elif value.numel():
            error = relative_error(value, truth)
            allowed = max(2 * relative_error(own, truth), _FLOOR[value.dtype])
            assert error <= min(allowed, largest_error(call, value.dtype, _CEILING)), (
                f"{where}: error {error:.2e}, allowed {allowed:.2e}"
            )

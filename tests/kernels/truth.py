"""What a raw function's results are compared with, and how close they have to be."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.conftest import INTERPRETED
from tests.native.calls import Call
from tests.raw import RawFunctions, as_tuple

reference = RawFunctions(None)

# Relative L2 against float64, as in the design. Triton's interpreter truncates where it rounds to bfloat16.
_CEILING = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 1e-3}
# Bicubic weights come from a filter centre in float32, as PyTorch's do: an ulp of a position of 600 is 6e-5.
_RESIZE_CEILING = {**_CEILING, torch.float32: 5e-5}
# Below this, twice the reference's own error says nothing: a result of one element may be rounded exactly by luck.
_FLOOR = {torch.float32: 3e-7, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 5e-4}


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
    plain = as_tuple(getattr(reference, call.name)(*call.args))
    assert len(results) == len(plain)
    ceiling = _RESIZE_CEILING if call.name.startswith("preprocess") else _CEILING
    for index, (value, own, truth) in enumerate(zip(results, plain, _exact(call, results), strict=True)):
        where = f"{call}[{index}]"
        assert value.dtype is own.dtype and value.shape == own.shape, where
        assert value.is_contiguous(), where
        if not value.is_floating_point():
            assert torch.equal(value, own), where
        elif value.numel():
            error = relative_error(value, truth)
            allowed = max(2 * relative_error(own, truth), _FLOOR[value.dtype])
            assert error <= min(allowed, ceiling[value.dtype]), f"{where}: error {error:.2e}, allowed {allowed:.2e}"


def relative_error(value: Tensor, truth: Tensor) -> float:
    """In L2; infinite where one is NaN and the other is not."""
    if not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    value, truth = value.double().nan_to_num(), truth.nan_to_num()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


def _exact(call: Call, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The reference's results in float64; what is computed of a rounded result starts from that result."""
    args = [_wide(arg) for arg in call.args]
    truth = as_tuple(getattr(reference, call.name)(*args))
    if call.name == "gated_residual_layer_norm_modulate_fwd":
        return truth[0], *reference.layer_norm_modulate_fwd(results[0].double(), *args[3:])
    if call.name == "sde_step_fwd" and results[0].numel():
        replay = reference.sde_step_fwd(*args[:4], results[0].double(), None, 0, *args[7:])
        return truth[0], *replay[1:]
    return truth


def _wide(arg):
    if isinstance(arg, Tensor) and arg.is_floating_point():
        return arg.double()
    return torch.float64 if isinstance(arg, torch.dtype) else arg

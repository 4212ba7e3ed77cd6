"""The DMD gradient on the kernels of csrc/."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_fast.backends.native.abi import struct_of
from dmdr_fast.backends.native.library import Calls, implements, on_samples

_STRUCT = struct_of(
    "dmdr_dmd_gradient_args",
    ("shape", "shape"),
    ("tensor", "x0 x_t pred_fake pred_real pred_real_uncond mask grad"),
    ("pointer", "sigma alpha cfg weight"),
    ("double", "cfg_scale eps factor"),
    (("standard", "offset"), "cfg_mode"),
    (("flow", "eps", "v", "x0"), "prediction"),
    (("per_sample", "global", "none"), "normalizer"),
    (("add", "clamp", "none"), "eps_mode"),
    (("zero", "torch", "zero_sample", "keep"), "nan_policy"),
    ("int", "reduction_sum scaled"),
    ("pointer", "norm loss loss_scale grad_loss workspace"),
)

# One per device and stream. Its first eight bytes count the blocks that have finished: 0 before and after a call.
_counting: dict[tuple[int | None, int], Tensor] = {}


@implements("dmd_gradient_fwd")
def dmd_gradient_fwd(run: Calls, a, out) -> None:
    mask = None if a.mask is None else run.part(a.mask.expand(a.x0.shape), a.mask)
    fields = run.samples(_STRUCT, a, out, mask=mask, cfg=a.cfg_tensor, reduction_sum=a.reduction == "sum")
    run.call("dmd_gradient_fwd", _STRUCT, fields | {"workspace": _workspace(run, fields["shape"], a.x0)})


on_samples("dmd_loss_bwd", _STRUCT, "dmd_gradient_bwd", pred_fake="g", grad="grad_x0")


def _workspace(run: Calls, shape: tuple[int, ...], x0: Tensor) -> Tensor:
    """Doubles for partial sums; for the CUDA kernels at least as many that no other stream uses, the first 0.

    Those are kept from call to call: zeroing them each time would be a launch. What a graph captures has its own,
    zeroed by the graph, for its replays may overlap with anything.
    """
    if run.library.device_type == "cpu":
        return run.workspace("dmd_gradient", math.prod(shape[:-1]), shape[-1], dtype=torch.float64)
    batch, device = x0.shape[0], run.device
    size = run.library.workspace_size("dmd_gradient", batch, x0.numel() // batch)

    def allocate() -> Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.float64, device=device)
        key = (device.index, torch.cuda.current_stream(device).cuda_stream)
        space = _counting.get(key)
        if space is None or space.numel() < size:
            space = _counting[key] = torch.zeros(size, dtype=torch.float64, device=device)
        return space

    return run.allocate(allocate)

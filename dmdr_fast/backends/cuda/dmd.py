"""The DMD gradient on the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.backends.cuda.library import contiguous_float, kernel, pointer, workspace_size
from dmdr_fast.backends.views import ABSENT, shared_view

_space = workspace_size("dmd_gradient", 2)
_fwd = kernel("dmd_gradient_fwd", "dmdr_dmd_gradient_args")
_bwd = kernel("dmd_gradient_bwd", "dmdr_dmd_gradient_args")

_CFG_MODE = {"standard": 0, "offset": 1}
_PREDICTION = {"flow": 0, "eps": 1, "v": 2, "x0": 3}
_NORMALIZER = {"per_sample": 0, "global": 1, "none": 2}
_EPS_MODE = {"add": 0, "clamp": 1, "none": 2}
_NAN_POLICY = {"zero": 0, "torch": 1, "zero_sample": 2, "keep": 3}
_NO_OPTIONS = (0.0,) * 3 + (0,) * 7

# One per device and stream. Its first eight bytes count the blocks that have finished: 0 before and after a call.
_workspaces: dict[tuple[int | None, int], Tensor] = {}


def dmd_gradient_fwd(
    x0: Tensor,
    x_t: Tensor,
    pred_fake: Tensor,
    pred_real: Tensor,
    pred_real_uncond: Tensor | None,
    sigma: Tensor,
    alpha: Tensor | None,
    cfg_tensor: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    cfg_scale: float,
    cfg_mode: str,
    prediction: str,
    normalizer: str,
    eps: float,
    eps_mode: str,
    nan_policy: str,
    out_dtype: torch.dtype,
    reduction: str,
    factor: float,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dmdr_fast.reference.dmd_gradient_fwd`."""
    if x0.numel() == 0:
        return reference.dmd_gradient_fwd(
            x0, x_t, pred_fake, pred_real, pred_real_uncond, sigma, alpha, cfg_tensor, mask, weight, cfg_scale,
            cfg_mode, prediction, normalizer, eps, eps_mode, nan_policy, out_dtype, reduction, factor, scaled,
        )  # fmt: skip
    device, batch = x0.device, x0.shape[0]
    grad = x0.new_empty(x0.shape, dtype=out_dtype)
    norm = x0.new_empty(batch, dtype=torch.float32)
    loss, loss_scale = (x0.new_empty((), dtype=torch.float32) for _ in range(2))
    if mask is not None:
        mask = mask.expand(x0.shape)
    scalars = [contiguous_float(scalar) for scalar in (sigma, alpha, cfg_tensor, weight)]
    space = _workspace(device, _space(batch, x0.numel() // batch))
    shape, fields, _held = shared_view(x0, x_t, pred_fake, pred_real, pred_real_uncond, mask, grad)
    x0, x_t, fake, real, uncond, on, out = fields
    _fwd(
        device, *shape, *x0, *x_t, *fake, *real, *uncond, *on, *out, *[pointer(scalar) for scalar in scalars],
        cfg_scale, eps, factor, _CFG_MODE[cfg_mode], _PREDICTION[prediction], _NORMALIZER[normalizer],
        _EPS_MODE[eps_mode], _NAN_POLICY[nan_policy], int(reduction == "sum"), int(scaled),
        norm.data_ptr(), loss.data_ptr(), loss_scale.data_ptr(), 0, space.data_ptr(),
    )  # fmt: skip
    return grad, norm, loss, loss_scale


def dmd_loss_bwd(grad_loss: Tensor, g: Tensor, loss_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.dmd_loss_bwd`."""
    result = g.new_empty(g.shape, dtype=dtype)
    grad_loss = contiguous_float(grad_loss)
    shape, (g, out), _held = shared_view(g, result)
    _bwd(
        result.device, *shape, *ABSENT, *ABSENT, *g, *ABSENT, *ABSENT, *ABSENT, *out, 0, 0, 0, 0, *_NO_OPTIONS,
        0, 0, loss_scale.data_ptr(), grad_loss.data_ptr(), 0,
    )  # fmt: skip
    return result


def _workspace(device: torch.device, size: int) -> Tensor:
    """At least ``size`` doubles that no other stream uses, the first 0.

    Kept from call to call: zeroing it each time would be a launch. What a graph captures has its own, zeroed by the
    graph, for its replays may overlap with anything.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.float64, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    space = _workspaces.get(key)
    if space is None or space.numel() < size:
        space = _workspaces[key] = torch.zeros(size, dtype=torch.float64, device=device)
    return space

"""The DMD gradient on the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.cpu.library import contiguous_float, kernel, new_float, new_output, pointer, workspace
from dmdr_fast.backends.views import ABSENT, shared_view

_space = workspace("dmd_gradient", 2, torch.float64)
_fwd = kernel("dmd_gradient_fwd", "dmdr_dmd_gradient_args")
_bwd = kernel("dmd_gradient_bwd", "dmdr_dmd_gradient_args")

_CFG_MODE = {"standard": 0, "offset": 1}
_PREDICTION = {"flow": 0, "eps": 1, "v": 2, "x0": 3}
_NORMALIZER = {"per_sample": 0, "global": 1, "none": 2}
_EPS_MODE = {"add": 0, "clamp": 1, "none": 2}
_NAN_POLICY = {"zero": 0, "torch": 1, "zero_sample": 2, "keep": 3}
_NO_OPTIONS = (0.0,) * 3 + (0,) * 7


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
    grad = new_output(x0.shape, out_dtype)
    norm = new_float(x0.shape[0])
    loss, loss_scale = new_float(()), new_float(())
    if mask is not None:
        mask = mask.expand(x0.shape)
    per_sample = [contiguous_float(scalar) for scalar in (sigma, alpha, cfg_tensor, weight)]
    shape, fields, _held = shared_view(x0, x_t, pred_fake, pred_real, pred_real_uncond, mask, grad)
    rows = shape[0] * shape[1] * shape[2] * shape[3] * shape[4]
    space = _space(rows, shape[5])
    x0, x_t, fake, real, uncond, on, out = fields
    _fwd(
        *shape, *x0, *x_t, *fake, *real, *uncond, *on, *out, *[pointer(scalar) for scalar in per_sample],
        cfg_scale, eps, factor, _CFG_MODE[cfg_mode], _PREDICTION[prediction], _NORMALIZER[normalizer],
        _EPS_MODE[eps_mode], _NAN_POLICY[nan_policy], int(reduction == "sum"), int(scaled),
        norm.data_ptr(), loss.data_ptr(), loss_scale.data_ptr(), 0, space.data_ptr(),
    )  # fmt: skip
    return grad, norm, loss, loss_scale


def dmd_loss_bwd(grad_loss: Tensor, g: Tensor, loss_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`dmdr_fast.reference.dmd_loss_bwd`."""
    result = new_output(g.shape, dtype)
    grad_loss = contiguous_float(grad_loss)
    shape, (g, out), _held = shared_view(g, result)
    _bwd(
        *shape, *ABSENT, *ABSENT, *g, *ABSENT, *ABSENT, *ABSENT, *out, 0, 0, 0, 0, *_NO_OPTIONS,
        0, 0, loss_scale.data_ptr(), grad_loss.data_ptr(), 0,
    )  # fmt: skip
    return result

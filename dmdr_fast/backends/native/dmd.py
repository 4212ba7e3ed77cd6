"""The DMD gradient on the kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.views import shared_view

_CFG_MODE = {"standard": 0, "offset": 1}
_PREDICTION = {"flow": 0, "eps": 1, "v": 2, "x0": 3}
_NORMALIZER = {"per_sample": 0, "global": 1, "none": 2}
_EPS_MODE = {"add": 0, "clamp": 1, "none": 2}
_NAN_POLICY = {"zero": 0, "torch": 1, "zero_sample": 2, "keep": 3}

# One per device and stream. Its first eight bytes count the blocks that have finished: 0 before and after a call.
_counting: dict[tuple[int | None, int], Tensor] = {}


@implements("dmd_gradient_fwd")
def dmd_gradient_fwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = run.new(a.x0.shape, a.out_dtype or a.x0.dtype)
    norm, loss, loss_scale = (run.new(shape, torch.float32) for shape in (a.x0.shape[:1], (), ()))
    mask = None if a.mask is None else run.part(a.mask.expand(a.x0.shape), a.mask)
    view = shared_view(a.x0, a.x_t, a.pred_fake, a.pred_real, a.pred_real_uncond, mask, grad)
    x0, x_t, fake, real, uncond, on, out = view.strided()
    run.call(
        "dmd_gradient_fwd", "dmdr_dmd_gradient_args", shape=view.shape, x0=x0, x_t=x_t, pred_fake=fake, pred_real=real,
        pred_real_uncond=uncond, mask=on, grad=out, sigma=run.scalars(a.sigma), alpha=run.scalars(a.alpha),
        cfg=run.scalars(a.cfg_tensor), weight=run.scalars(a.weight), cfg_scale=a.cfg_scale, eps=a.eps, factor=a.factor,
        cfg_mode=_CFG_MODE[a.cfg_mode], prediction=_PREDICTION[a.prediction], normalizer=_NORMALIZER[a.normalizer],
        eps_mode=_EPS_MODE[a.eps_mode], nan_policy=_NAN_POLICY[a.nan_policy], reduction_sum=a.reduction == "sum",
        scaled=a.scaled, norm=norm, loss=loss, loss_scale=loss_scale, workspace=_workspace(run, view, a.x0),
    )  # fmt: skip
    return grad, norm, loss, loss_scale


@implements("dmd_loss_bwd", entry="dmd_gradient_bwd")
def dmd_loss_bwd(run: Calls, a) -> Tensor:
    result = run.new(a.g.shape, a.dtype)
    view = shared_view(a.g, result)
    g, out = view.strided()
    run.call(
        "dmd_gradient_bwd", "dmdr_dmd_gradient_args", shape=view.shape, pred_fake=g, grad=out,
        loss_scale=a.loss_scale, grad_loss=run.scalars(a.grad_loss),
    )  # fmt: skip
    return result


def _workspace(run: Calls, view, x0: Tensor) -> Tensor:
    """Doubles for partial sums; for the CUDA kernels at least as many that no other stream uses, the first 0.

    Those are kept from call to call: zeroing them each time would be a launch. What a graph captures has its own,
    zeroed by the graph, for its replays may overlap with anything.
    """
    if run.library.device_type == "cpu":
        return run.workspace("dmd_gradient", view.rows, view.shape[-1], dtype=torch.float64)
    batch = x0.shape[0]
    size = run.library.workspace_size("dmd_gradient", batch, x0.numel() // batch)

    def allocate(device: torch.device) -> Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.float64, device=device)
        key = (device.index, torch.cuda.current_stream(device).cuda_stream)
        space = _counting.get(key)
        if space is None or space.numel() < size:
            space = _counting[key] = torch.zeros(size, dtype=torch.float64, device=device)
        return space

    return run.allocate(allocate)

"""SDE steps with their log-probabilities on the kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.backends.native.library import Calls, implements
from dmdr_fast.backends.views import shared_view

_KIND = {"flow_grpo": 0, "dance": 1, "cps": 2}


@implements("sde_step_fwd")
def sde_step_fwd(run: Calls, a) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = run.new((0,) if a.seed is None else a.x.shape, a.x.dtype)
    result = run.new(a.x.shape, torch.float32)
    logprob, std = (run.new(a.x.shape[:1], torch.float32) for _ in range(2))
    view = shared_view(a.x, a.v, drawn if a.next_sample is None else a.next_sample, result)
    x, v, next_sample, mean = view.strided()
    run.call(
        "sde_step_fwd", "dmdr_sde_step_args", shape=view.shape, x=x, v=v, next_sample=next_sample, mean=mean,
        sigma=run.scalars(a.sigma), sigma_next=run.scalars(a.sigma_next),
        seed=None if a.seed is None else a.seed.contiguous(), offset=a.offset, kind=_KIND[a.kind], eta=a.eta,
        logprob=logprob, std=std,
        workspace=run.workspace("sde_step", view.rows, view.shape[-1], dtype=torch.float64),
    )  # fmt: skip
    return drawn, logprob, result, std


@implements("sde_step_bwd")
def sde_step_bwd(run: Calls, a) -> tuple[Tensor, Tensor]:
    result_x = run.new(a.x.shape if a.need_x else (0,), a.x.dtype)
    result_v = run.new(a.v.shape if a.need_v else (0,), a.v.dtype)
    results = result_x if a.need_x else None, result_v if a.need_v else None
    view = shared_view(a.x, a.v, a.next_sample, a.grad_next, a.grad_mean, *results)
    x, v, next_sample, grad_next, grad_mean, grad_x, grad_v = view.strided()
    run.call(
        "sde_step_bwd", "dmdr_sde_step_args", shape=view.shape, x=x, v=v, next_sample=next_sample,
        grad_next=grad_next, grad_mean=grad_mean, grad_x=grad_x, grad_v=grad_v, sigma=run.scalars(a.sigma),
        sigma_next=run.scalars(a.sigma_next), kind=_KIND[a.kind], eta=a.eta, grad_logprob=run.scalars(a.grad_logprob),
    )  # fmt: skip
    return result_x, result_v

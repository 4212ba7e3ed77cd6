"""Calls of the public functions as a user's type checker sees them; mypy reads this file, nothing runs it.

An ``ignore`` says which error a wrong call must give: without the error the ignore is unused, and that is one too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dmdr_fast
from dmdr_fast import ops
from dmdr_fast.patch import PatchReport, patch


def scores(x0: Tensor, t: Tensor, seed: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    x_t: Tensor = ops.renoise(x0, 1 - t, t, seed=seed)
    out: ops.DMDGradient = ops.dmd_gradient(
        x0, x_t, fake, real, sigma=t, prediction="v", normalizer="global", mask=None
    )
    weight: Tensor = out.weight
    loss: Tensor = ops.dmd_loss(x0, x_t, fake, real, real, sigma=0.5, cfg_scale=4.0, cfg_mode="offset", reduction="sum")
    ops.renoise(x0, 1 - t, t, seed)  # type: ignore[call-arg]
    ops.renoise(x0, 1 - t, t, seed=7)  # type: ignore[arg-type]
    ops.dmd_gradient(x0, x_t, fake, real, sigma=t, prediction="velocity")  # type: ignore[arg-type]
    ops.dmd_gradient(x0, x_t, fake, real, sigma=t, nan_policy=None)  # type: ignore[arg-type]
    ops.dmd_gradient(x0, x_t, fake, real)  # type: ignore[call-arg]
    ops.dmd_loss(x0, x_t, fake, real, sigma=t, reduction="none")  # type: ignore[arg-type]
    return out.loss + weight.sum() + loss + out.gradient  # type: ignore[attr-defined]


def blocks(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    residual, normed = ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale, out_dtype=torch.bfloat16)
    q, k = ops.qk_norm_rope(x, h, interleaved=False)
    y = ops.gelu_mul(normed, approximate="tanh") + ops.silu_mul(normed) + ops.rms_norm_scale(x, None, scale)
    ops.gelu_mul(normed, approximate="sigmoid")  # type: ignore[arg-type]
    ops.layer_norm_modulate(x, shift, scale, eps="1e-6")  # type: ignore[arg-type]
    ops.multi_lora(x, h, shift, scale)  # type: ignore[call-arg]
    return residual + q + k + y


def rollout(x: Tensor, v: Tensor, images: Tensor, mean: tuple[float, ...]) -> Tensor:
    step: ops.SDEStep = ops.sde_step_logprob(x, v, 0.5, 0.25, kind="dance", eta=0.3, next_sample=x)
    ops.sde_step_logprob(x, v, 0.5, 0.25, kind="ddim", eta=0.3, next_sample=x)  # type: ignore[arg-type]
    loss, ratios = ops.grpo_loss(step.logprob, step.logprob, step.logprob, clip_low=0.1, clip_high=0.1)
    pixels: Tensor = ops.preprocess_reward(images, (224, 224), mean, mean)
    ops.preprocess_reward(images, "224", mean, mean)  # type: ignore[arg-type]
    return loss + ratios.mean + pixels.sum()


def models(model: nn.Module) -> str:
    with dmdr_fast.patch(model, ops=["gated_residual"], strict=False) as report:
        found: PatchReport = report
    patch(model, strict=False, undo=True)  # type: ignore[call-arg]
    choice: ops.Choice = ops.explain("renoise", torch.zeros(2, 3), 0.5, 0.5, seed=None)
    ops.nn.GEGLU(8, 16, approximate="relu")  # type: ignore[arg-type]
    return f"{found} {choice.backend}"

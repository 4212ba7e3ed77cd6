"""The DMD gradient on the leaf x0, and the loss that trains the fake score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmdr_fast import ops
from dmdr_fast.algorithm.guidance import Mode, guide
from dmdr_fast.algorithm.paths import FLOW, Path, target
from dmdr_fast.algorithm.score_pass import ScorePass, Scores
from dmdr_fast.ops.dmd import EpsMode, NaNPolicy, Normalizer, Prediction, Reduction


@dataclass(frozen=True)
class DMDOptions:
    """How the DMD gradient is normalised and guided; the names are those of :func:`dmdr_fast.ops.dmd_gradient`.

    cfg_mode, token: of :func:`dmdr_fast.algorithm.guidance.guide`.

    reduction: ``mean`` is loss = 1/2 mean g^2 (gradient g / numel, every public DMD trainer but one); ``sum`` is
    rCM's loss = sum g^2 per sample, averaged over the batch (gradient 2 g / B).
    """

    cfg_scale: float = 1.0
    cfg_mode: Mode = "standard"
    token: int = 1
    prediction: Prediction = "flow"
    normalizer: Normalizer = "per_sample"
    eps: float = 1e-8
    eps_mode: EpsMode = "add"
    nan_policy: NaNPolicy = "keep"
    reduction: Reduction = "mean"

    @property
    def uses_cfg(self) -> bool:
        """Whether the unconditional prediction matters: not at scale 1, in offset form 0."""
        return self.cfg_scale != (0.0 if self.cfg_mode == "offset" else 1.0)

    def guided_scale(self, guidance: Tensor | None) -> Tensor | float:
        """The CFG scale, fp32 [B] where a factor per sample weighs the guidance part."""
        if guidance is None:
            return self.cfg_scale
        return self.cfg_scale * guidance if self.cfg_mode == "offset" else 1.0 + (self.cfg_scale - 1.0) * guidance


def dmd_leaf_gradient(
    x0: Tensor,
    t: Tensor,
    noise_seed: Tensor,
    cond: Any,
    uncond: Any | None,
    score: ScorePass,
    options: DMDOptions,
    *,
    real_scale: float,
    noise_offset: int = 0,
    path: Path = FLOW,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """d(DMD loss)/d(x0) for the leaf x0 [B, ...], and the loss 1/2 mean g^2 (0-d), both detached.

    g = (x0_fake - x0_real) / w at x_t = alpha x0 + sigma noise; t fp32 [B]. The noise is drawn inside the renoise
    kernel from ``noise_seed`` and never stored. See :func:`dmdr_fast.ops.dmd_gradient`.

    ``guidance`` fp32 [B] multiplies the teacher's guidance, real - cond, sample by sample: a CFG scale of
    1 + (w - 1) f in standard form. It needs ``uncond``.
    """
    alpha, sigma = path.alpha_sigma(t)
    x_t = ops.renoise(x0, alpha, sigma, seed=noise_seed, offset=noise_offset)
    scores = score(x_t, t, cond, uncond, real_scale=real_scale)
    out = dmd_gradient(x0, x_t, scores, alpha, sigma, options, guidance)
    factor = 1.0 / x0.numel() if options.reduction == "mean" else 2.0 / x0.shape[0]
    return out.grad * factor, out.loss


def dmd_gradient(
    x0: Tensor,
    x_t: Tensor,
    scores: Scores,
    alpha: Tensor,
    sigma: Tensor,
    options: DMDOptions,
    guidance: Tensor | None = None,
) -> ops.DMDGradient:
    """The normalised g of the scores at x_t, guided as ``options`` say, with its loss.

    The op guides in its own pass over the predictions; a mode that it does not know is applied before it.
    """
    real, uncond, mode = scores.real, scores.real_uncond, options.cfg_mode
    scale = None if uncond is None else options.guided_scale(guidance)
    if uncond is not None and scale is not None and mode == "per_token":
        real, uncond, scale = guide(real, uncond, scale, mode, options.token), None, None
    return ops.dmd_gradient(
        x0,
        x_t,
        scores.fake,
        real,
        uncond,
        sigma=sigma,
        alpha=alpha,
        cfg_scale=scale,
        cfg_mode="offset" if mode == "offset" else "standard",
        prediction=options.prediction,
        normalizer=options.normalizer,
        eps=options.eps,
        eps_mode=options.eps_mode,
        nan_policy=options.nan_policy,
    )


def score_matching_loss(prediction: Tensor, x0: Tensor, noise: Tensor, kind: Prediction = "flow") -> Tensor:
    """The fake score's loss at x_t = alpha x0 + sigma noise, mean over all elements (0-d), computed in fp32 or fp64.

    ``flow`` mean |v - (noise - x0)|^2; ``eps`` mean |eps_hat - noise|^2; ``x0`` mean |x0_hat - x0|^2.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target(x0, noise, kind).to(dtype)).square().mean()


def fake_loss(
    fake, x0: Tensor, t: Tensor, noise: Tensor, cond: Any, kind: Prediction = "flow", path: Path = FLOW
) -> Tensor:
    """One denoising loss of the fake score (graded) on the generator's samples x0, renoised to t."""
    x_t = ops.renoise(x0.detach(), *path.alpha_sigma(t), noise=noise)
    with torch.enable_grad():
        return score_matching_loss(fake(x_t, t, cond), x0, noise, kind)

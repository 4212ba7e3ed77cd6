"""The DMD gradient on the leaf x0, and the loss that trains the fake score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmdr_fast import ops
from dmdr_fast.algorithm.guidance import Mode, guide
from dmdr_fast.algorithm.paths import FLOW, Path, target
from dmdr_fast.algorithm.schedules import shift_time, unshift_time
from dmdr_fast.algorithm.score_pass import Rows, ScorePass, Scores, scores_at
from dmdr_fast.ops.dmd import EpsMode, NaNPolicy, Normalizer, Prediction, Reduction


@dataclass(frozen=True)
class Augmentation:
    """CFG augmentation (CA), the part of decoupled DMD with a renoise time, a noise and a normaliser of its own.

    Its times are uniform in [t_min, the generator's own time], before the shift.
    """

    t_min: float = 0.001
    shift: float = 1.0
    normalizer: Normalizer = "per_sample"

    def times(self, u: Tensor, t_in: Tensor) -> Tensor:
        """tau = shift(t_min + u (unshift(t_in) - t_min)), fp32 [B], for ``u`` uniform in [0, 1); never below t_min.

        So CA sees x0 no noisier than the generator saw its input, ``t_in`` [B].
        """
        span = (unshift_time(t_in, self.shift) - self.t_min).clamp(min=0.0)
        return shift_time(self.t_min + u * span, self.shift)


@dataclass(frozen=True)
class DMDOptions:
    """How the DMD gradient is normalised and guided; the names are those of :func:`dmdr_fast.ops.dmd_gradient`.

    cfg_mode, token: of :func:`dmdr_fast.algorithm.guidance.guide`. ca: decoupled DMD where it is given.

    reduction: ``mean`` is loss = 1/2 mean g^2 (gradient g / numel, that of all trainers in docs/drop-in.md but
    one); ``sum`` is rCM's loss = sum g^2 per sample, averaged over the batch (gradient 2 g / B).
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
    ca: Augmentation | None = None

    @property
    def uses_cfg(self) -> bool:
        """Whether the unconditional prediction matters: not at scale 1, in offset form 0."""
        return self.cfg_scale != (0.0 if self.cfg_mode == "offset" else 1.0)

    def guided_scale(self, guidance: Tensor | None) -> Tensor | float:
        """The CFG scale, fp32 [B] where a factor per sample weights the guidance part."""
        if guidance is None:
            return self.cfg_scale
        return self.cfg_scale * guidance if self.cfg_mode == "offset" else 1.0 + (self.cfg_scale - 1.0) * guidance


class Renoising(NamedTuple):
    """Times fp32 [B], and the noise: its int64[2] seed and the place of the batch's first element in its stream.

    The noise is drawn inside the renoise kernel and never stored.
    """

    t: Tensor
    seed: Tensor
    offset: int = 0

    def __call__(self, x0: Tensor, path: Path) -> Tensor:
        """x_t = alpha x0 + sigma noise."""
        return ops.renoise(x0, *path.alpha_sigma(self.t), seed=self.seed, offset=self.offset)


def dmd_leaf_gradient(
    x0: Tensor,
    renoising: Renoising,
    cond: Any,
    uncond: Any | None,
    score: ScorePass,
    options: DMDOptions,
    *,
    real_scale: float,
    path: Path = FLOW,
    guidance: Tensor | None = None,
    ca: Renoising | None = None,
) -> tuple[Tensor, Tensor]:
    """d(DMD loss)/d(x0) for the leaf x0 [B, ...], and the loss 1/2 mean g^2 (0-d), both detached.

    g = (x0_fake - x0_real) / n at the renoised x_t. See :func:`dmdr_fast.ops.dmd_gradient`. With ``ca`` the two parts
    of that difference have a renoising each (:func:`decoupled_gradient`), which needs ``options.ca``.

    ``guidance`` fp32 [B] multiplies the teacher's guidance, real - cond, sample by sample: a CFG scale of
    1 + (w - 1) f in standard form. It and ``ca`` need ``uncond``.
    """
    if ca is None:
        x_t = renoising(x0, path)
        scores = scores_at(score, x_t, renoising.t, cond, uncond, real_scale=real_scale)
        g, _, loss = dmd_gradient(x0, x_t, scores, *path.alpha_sigma(renoising.t), options, guidance)
    else:
        g = decoupled_gradient(
            x0, renoising, ca, cond, uncond, score, options, real_scale=real_scale, path=path, guidance=guidance
        )
        loss = 0.5 * g.square().mean()
    return g * (1.0 / x0.numel() if options.reduction == "mean" else 2.0 / x0.shape[0]), loss


def decoupled_gradient(
    x0: Tensor,
    dm: Renoising,
    ca: Renoising,
    cond: Any,
    uncond: Any,
    score: ScorePass,
    options: DMDOptions,
    *,
    real_scale: float,
    path: Path = FLOW,
    guidance: Tensor | None = None,
) -> Tensor:
    """Decoupled DMD: g = DM(tau_dm) / n_dm + CA(tau_ca) / n_ca, x0's shape.

        DM = x0_fake - c                     the regulariser
        CA = c - guided(c, u)                the engine; -(w - 1) (c - u) in standard form, times f by ``guidance``

    c and u are the teacher's denoised samples with and without condition, n_dm = mean |x0 - c| and n_ca =
    mean |x0 - guided| by the normalisers of ``options`` and ``options.ca``. At one time, noise and normaliser the sum
    is the plain gradient. One score pass of four rows: fake and c at tau_dm, c and u at tau_ca.

    Source: Decoupled DMD (arXiv 2511.22677).
    """
    assert options.ca is not None  # a decoupled run has it
    x_dm, x_ca = dm(x0, path), ca(x0, path)
    at_dm, cleaner, null = Rows(x_dm, dm.t, cond), Rows(x_ca, ca.t, cond), Rows(x_ca, ca.t, uncond)
    fake, real, c, u = score(at_dm, at_dm, cleaner, null, real_scale=real_scale)
    own = replace(options, normalizer=options.ca.normalizer)
    part_dm = dmd_gradient(x0, x_dm, Scores(fake, real, None), *path.alpha_sigma(dm.t), options)
    part_ca = dmd_gradient(x0, x_ca, Scores(c, c, u), *path.alpha_sigma(ca.t), own, guidance)
    return part_dm.grad + part_ca.grad


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

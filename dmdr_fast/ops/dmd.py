"""The DMD gradient and the loss whose backward injects it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dmdr_fast import reference
from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import Raw, written
from dmdr_fast.reference import Result, compute_dtype, like, per_sample

CFGMode = Literal["standard", "offset"]
Prediction = Literal["flow", "eps", "v", "x0"]
Normalizer = Literal["per_sample", "global", "none"]
EpsMode = Literal["add", "clamp", "none"]
NaNPolicy = Literal["zero", "torch", "zero_sample", "keep"]
Reduction = Literal["mean", "sum"]


class DMDGradient(NamedTuple):
    """What ``dmd_gradient`` returns, all on x0's device.

    Attributes:
        grad: x0's shape, contiguous: the normalised g, in x0's dtype or ``out_dtype``.
        weight: [B] float32: the normaliser each sample was divided by, eps included (1 with ``"none"``).
        loss: 0-d float32: 1/2 mean(g^2).
    """

    grad: Tensor
    weight: Tensor
    loss: Tensor


def dmd_gradient(
    x0: Tensor,
    x_t: Tensor,
    pred_fake: Tensor,
    pred_real: Tensor,
    pred_real_uncond: Tensor | None = None,
    *,
    sigma: Tensor | float,
    alpha: Tensor | float | None = None,
    cfg_scale: Tensor | float | None = None,
    cfg_mode: CFGMode = "standard",
    prediction: Prediction = "flow",
    normalizer: Normalizer = "per_sample",
    eps: float = 1e-8,
    eps_mode: EpsMode = "add",
    nan_policy: NaNPolicy = "keep",
    mask: Tensor | None = None,
    weight: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
) -> DMDGradient:
    r"""The distribution matching gradient of a generator's sample x0.

        real = u + w (c - u)          c = pred_real, u = pred_real_uncond, w = cfg_scale ("standard")
        real = c + w (c - u)          ("offset": a scale w here is w + 1 there)
        g    = weight_b (x0_fake - x0_real) / n_b
        n_b  = mean |x0 - x0_real|    over the sample ("per_sample"), over all of x0 ("global"), or 1 ("none")

    where x0_hat of a prediction p is x_t - sigma p ("flow"), (x_t - sigma p) / alpha ("eps"),
    alpha x_t - sigma p ("v") or p ("x0"). x0_fake - x0_real is computed as a multiple of pred_fake - real in
    float32, never as a difference of large denoised samples and never through a pseudo-target x0 - g.

    Nothing here is differentiable: all inputs are constants. Feed ``grad`` to ``x0.backward``, or take
    ``dmd_loss``.

    Args:
        x0: the generator's sample [B, ...], at least 2-D. Any float dtype, as all latents here; dtypes may be
            mixed.
        x_t: x0 renoised to sigma, x0's shape.
        pred_fake: prediction of the fake score on x_t, x0's shape.
        pred_real: prediction of the real score on x_t, conditional.
        pred_real_uncond: its unconditional prediction; given together with ``cfg_scale``.
        sigma: noise level [B] (or one number), >= 0.
        alpha: signal level [B] (or one number), >= 0; None means 1 - sigma. Read for "eps" and "v" only.
        cfg_scale: finite number or [B].
        cfg_mode: "standard" or "offset".
        prediction: "flow", "eps", "v" or "x0": what the three predictions are.
        normalizer: "per_sample", "global" or "none". "global" is over this tensor, not over ranks.
        eps: at least 0; see ``eps_mode``. Unused with normalizer "none".
        eps_mode: "add": n + eps; "clamp": max(n, eps); "none": n as it is.
        nan_policy: for elements of g that are not finite in the output dtype.
            "keep": they stay, so that whoever steps can see them and skip, as the trainer does. "zero": NaN and
            infinities become 0. "torch": torch.nan_to_num in the output dtype: NaN 0, +-inf the dtype's largest
            value. "zero_sample": the whole sample becomes 0.
        mask: bool or 0/1 tensor with x0's number of dimensions, each of size 1 or x0's. Means are over what
            it selects; g is 0 elsewhere. A sample it leaves empty gets g = 0.
        weight: extra factor of g, [B] or a number, finite.
        out_dtype: dtype of ``grad``; None means x0's.

    Returns:
        ``DMDGradient`` (grad, weight, loss). The loss is the (masked) mean of g^2 / 2 after
        ``nan_policy``; 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument is not as described. Values inside tensors are read only on the CPU
            and outside torch.compile: there a non-finite cfg_scale, a negative sigma or a mask that selects
            nothing is an error.

    Source: DMD (arXiv 2311.18828, eq. 7 and 8), DMD2, FastGen, FastVideo, rCM: docs/drop-in.md has the call
    for each.
    """
    with torch.no_grad():
        grad, norm, loss, _ = _run(
            "dmd_gradient", x0, x_t, pred_fake, pred_real, pred_real_uncond, sigma, alpha, cfg_scale, mask, weight,
            cfg_mode, prediction, normalizer, eps, eps_mode, nan_policy, out_dtype, "mean", 0.5, False,
        )  # fmt: skip
    return DMDGradient(grad, norm, loss.detach())  # in forward mode it has the tangent of dmd_loss


def dmd_loss(
    x0: Tensor,
    x_t: Tensor,
    pred_fake: Tensor,
    pred_real: Tensor,
    pred_real_uncond: Tensor | None = None,
    *,
    sigma: Tensor | float,
    alpha: Tensor | float | None = None,
    cfg_scale: Tensor | float | None = None,
    cfg_mode: CFGMode = "standard",
    prediction: Prediction = "flow",
    normalizer: Normalizer = "per_sample",
    eps: float = 1e-8,
    eps_mode: EpsMode = "add",
    nan_policy: NaNPolicy = "keep",
    mask: Tensor | None = None,
    weight: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    reduction: Reduction = "mean",
    factor: float = 0.5,
) -> Tensor:
    r"""factor * mean(g^2) or factor * sum(g^2), with the gradient factor * 2 g / numel or factor * 2 g on x0.

    The drop-in for ``factor * mse_loss(x0, (x0 - g).detach())``: same value, same gradient, but g does not
    pass through a rounded pseudo-target (in bfloat16 that loses 6 % of g at rms(g) = 0.03). Only x0 gets a
    gradient; everything else is a constant, x_t included, and so is that gradient: it has no derivative in x0. The
    forward writes it; a backward multiplies it by the incoming one, or hands it on as it is (on the CPU, incoming
    gradient 1, graph not retained).

    Args:
        x0, x_t, ..., weight: as in ``dmd_gradient``.
        out_dtype: dtype in which the gradient is kept for the backward; None means x0's. The result has x0's.
        reduction: "mean" (numel counts what the mask selects) or "sum".
        factor: finite; 0.5 in DMD and most trainers, rCM has 1 with "sum".

    Returns:
        0-d float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as ``dmd_gradient``.

    Source: DMD2 (arXiv 2405.14867), the loss of its public trainer; docs/drop-in.md.
    """
    # The forward keeps d loss / d x0, or g where that cannot be: a masked mean's count is known after the pass only,
    # and float16 has no number as small as g / numel.
    scaled = (mask is None or reduction == "sum") and (out_dtype or getattr(x0, "dtype", None)) is not torch.float16
    return _run(
        "dmd_loss", x0, x_t, pred_fake, pred_real, pred_real_uncond, sigma, alpha, cfg_scale, mask, weight,
        cfg_mode, prediction, normalizer, eps, eps_mode, nan_policy, out_dtype, reduction, factor, scaled,
    )[2]  # fmt: skip


def _run(op, x0, x_t, fake, real, uncond, sigma, alpha, cfg_scale, mask, weight, cfg_mode, prediction, *options):
    """The raw function, its per-sample numbers made of what the public one takes."""
    check.floating(op, "x0", x0, min_dim=2)
    if (uncond is None) != (cfg_scale is None):
        missing = "cfg_scale" if cfg_scale is None else "pred_real_uncond"
        raise ValueError(f"{op}: {missing}: expected with its counterpart (CFG needs both), got None")
    dtype = compute_dtype(x0, x_t, fake, real, uncond)
    reads_alpha = prediction in ("eps", "v")
    largest = 1.0 if reads_alpha and alpha is None else math.inf  # alpha is then 1 - sigma
    sigma = check.scalar(op, "sigma", sigma, x0, dtype, minimum=0, maximum=largest)
    if not reads_alpha:
        alpha = None
    elif alpha is not None:
        alpha = check.scalar(op, "alpha", alpha, x0, dtype, minimum=0)
    # A number stays one: as a tensor it would cost a launch of its own.
    cfg_number, cfg_tensor = 1.0 if cfg_scale is None else cfg_scale, None
    if isinstance(cfg_scale, Tensor):
        cfg_number, cfg_tensor = 1.0, check.scalar(op, "cfg_scale", cfg_scale, x0, dtype)
    if weight is not None:
        weight = check.scalar(op, "weight", weight, x0, dtype)
    if isinstance(mask, Tensor) and mask.dtype is not torch.bool:
        mask = mask != 0
    return _fwd.checked(
        op, x0, x_t, fake, real, uncond, sigma, alpha, cfg_tensor, mask, weight, cfg_number, cfg_mode, prediction,
        *options,
    )  # fmt: skip


def _check(op: str, a) -> None:
    for name in ("x_t", "pred_fake", "pred_real"):
        check.like(op, name, getattr(a, name), a.x0, "x0")
    if a.pred_real_uncond is not None:
        check.like(op, "pred_real_uncond", a.pred_real_uncond, a.x0, "x0")
    check.number(op, "eps", a.eps, minimum=0)
    check.number(op, "factor", a.factor)
    check.number(op, "cfg_scale", a.cfg_scale)
    for name, value in (("sigma", a.sigma), ("alpha", a.alpha), ("cfg_scale", a.cfg_tensor), ("weight", a.weight)):
        if value is not None:
            check.per_sample(op, name, value, a.x0, "x0")
    mask, x0 = a.mask, a.x0
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask: expected a tensor, got {type(mask).__name__}")
    if mask.dim() != x0.dim() or any(m != 1 and m != n for m, n in zip(mask.shape, x0.shape, strict=True)):
        raise ValueError(
            f"{op}: mask: expected {x0.dim()} dimensions, each 1 or x0's of {list(x0.shape)}, got {list(mask.shape)}"
        )
    check.on_device(op, "mask", mask, x0, "x0")


def _check_values(op: str, a) -> None:
    reads_one_minus_sigma = a.prediction in ("eps", "v") and a.alpha is None
    check.values(op, "sigma", a.sigma, minimum=0, maximum=1.0 if reads_one_minus_sigma else math.inf)
    check.values(op, "alpha", a.alpha, minimum=0)
    check.values(op, "cfg_scale", a.cfg_tensor)
    check.values(op, "weight", a.weight)
    if a.mask is not None and check.readable(a.mask) and not a.mask.any():
        raise ValueError(f"{op}: mask: expected at least one selected element, got none")


def _save(ctx, a, results) -> None:
    grad, _, _, loss_scale = results
    ctx.save_for_backward(grad, loss_scale)
    ctx.dtype, ctx.scaled = a.x0.dtype, a.scaled


def _backward(ctx, needed, _grad, _norm, grad_loss, _scale) -> dict:
    grad, loss_scale = ctx.saved_tensors
    if grad_loss is None or not needed.x0:
        return {}
    if ctx.scaled and grad.dtype is ctx.dtype and _is_one(grad_loss) and _reads_last():
        return {"x0": grad}
    return {"x0": _bwd(grad_loss, grad, loss_scale, ctx.dtype)}


def _is_one(number: Tensor) -> bool:
    """Whether a tensor that can be read without waiting (on the CPU, not traced) is 1."""
    return check.readable(number) and number.item() == 1


def _reads_last() -> bool:
    """Whether the running backward is the last one to read what was saved: then it can be handed on, not copied."""
    return not (torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())


def _derived(a):
    """The loss's derivative is the gradient that it injects into x0, not that of its value."""
    grad, norm, loss, loss_scale = (part.detach() for part in reference.run("dmd_gradient_fwd", a))
    slope = grad.to(loss.dtype) * loss_scale
    x0 = a.x0.to(loss.dtype)
    moved = torch.where(slope != 0, x0 - x0.detach(), 0)
    return grad, norm, loss + (slope * moved).sum(), loss_scale


def _results(a):
    compute = compute_dtype(a.x0, a.x_t, a.pred_fake, a.pred_real, a.pred_real_uncond)
    scalar = Result((), compute)
    return like(a.x0, a.out_dtype), Result(a.x0.shape[:1], compute), scalar, scalar


def _formula(
    x0: Tensor, x_t: Tensor, pred_fake: Tensor, pred_real: Tensor, pred_real_uncond: Tensor | None,
    sigma: Tensor, alpha: Tensor | None, cfg_tensor: Tensor | None, mask: Tensor | None, weight: Tensor | None,
    cfg_scale: float, cfg_mode: CFGMode, prediction: Prediction, normalizer: Normalizer,
    eps: float, eps_mode: EpsMode, nan_policy: NaNPolicy, out_dtype: torch.dtype | None,
    reduction: Reduction, factor: float, scaled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``mask`` is boolean; ``cfg_tensor`` [B] takes the place of ``cfg_scale``.

    loss_scale is d loss / d x0 divided by grad: 2 factor / count, or 2 factor; 1 where ``scaled``: the gradient is then
    that of the loss.
    """
    compute, dtype = compute_dtype(x0, x_t, pred_fake, pred_real, pred_real_uncond), out_dtype or x0.dtype
    x0, x_t, fake, real = (tensor.to(compute) for tensor in (x0, x_t, pred_fake, pred_real))
    if pred_real_uncond is not None:
        scale = cfg_scale if cfg_tensor is None else per_sample(cfg_tensor, x0)
        uncond = pred_real_uncond.to(compute)
        real = (uncond if cfg_mode == "standard" else real) + scale * (real - uncond)

    keep, gain = _denoiser(prediction, sigma, 1 - sigma if alpha is None else alpha)
    g = per_sample(gain, x0) * (fake - real)
    # x0 and x_t are close at small sigma: their difference first, it is exact there.
    distance = x0 if keep is None else x0 - per_sample(keep, x0) * x_t
    norm = _normalizer(distance - per_sample(gain, x0) * real, mask, normalizer, eps, eps_mode)
    g = g / per_sample(norm, x0)
    if weight is not None:
        g = per_sample(weight, x0) * g
    g = _without_nonfinite(_select(g, mask), nan_policy, dtype)

    count = g.new_full((), g.numel()) if mask is None else mask.expand_as(g).sum().to(compute)
    loss_scale = 2 * factor / count.clamp(min=1) if reduction == "mean" else torch.full_like(count, 2 * factor)
    loss = g.square().sum() * (0.5 * loss_scale)
    if scaled:
        g, loss_scale = loss_scale * g, torch.ones_like(loss_scale)
    return g, norm, loss, loss_scale


def _formula_bwd(grad_loss: Tensor, g: Tensor, loss_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad_loss * loss_scale).to(loss_scale.dtype) * g.to(loss_scale.dtype)


def _denoiser(prediction: str, sigma: Tensor, alpha: Tensor) -> tuple[Tensor | None, Tensor]:
    """(keep, gain) of x0_hat = keep x_t + gain prediction; keep None is 0."""
    if prediction == "flow":
        return torch.ones_like(sigma), -sigma
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha, -sigma
    return None, torch.ones_like(sigma)


def _select(values: Tensor, mask: Tensor | None) -> Tensor:
    """0 where the mask is off, whatever stood there (a product would keep a NaN)."""
    return values if mask is None else torch.where(mask, values, 0)


def _normalizer(distance: Tensor, mask: Tensor | None, normalizer: str, eps: float, eps_mode: str) -> Tensor:
    """mean |x0 - x0_real| over what the mask selects, per sample or over all, with eps: [B]."""
    batch = distance.shape[0]
    if normalizer == "none":
        return distance.new_ones(batch)
    total = _select(distance.abs(), mask).flatten(1).sum(1)
    if mask is None:
        count = torch.full_like(total, distance[:1].numel())
    else:
        count = mask.expand_as(distance).flatten(1).sum(1).to(total.dtype)
    if normalizer == "global":
        total, count = total.sum().expand(batch), count.sum().expand(batch)
    mean = total / count.clamp(min=1)
    if eps_mode == "add":
        return mean + eps
    return mean.clamp(min=eps) if eps_mode == "clamp" else mean


def _without_nonfinite(g: Tensor, nan_policy: str, out_dtype: torch.dtype) -> Tensor:
    """Apply the policy where g is not finite once rounded to ``out_dtype``."""
    if nan_policy == "keep":
        return g
    finite = torch.isfinite(g.to(out_dtype))
    if nan_policy == "zero":
        return torch.where(finite, g, 0)
    if nan_policy == "zero_sample":
        return torch.where(per_sample(finite.flatten(1).all(1), g), g, 0)
    largest = torch.finfo(out_dtype).max
    return torch.where(finite, g, g.nan_to_num(nan=0.0).clamp(-largest, largest))


_bwd = Raw("dmd_loss_bwd", "grad_x0", lambda a: like(a.g, a.dtype), _formula_bwd)
_fwd = Raw(
    "dmd_gradient_fwd", "grad norm loss loss_scale", _results, _formula, check=_check, check_values=_check_values,
    backward=written(_save, _backward), constants=(0, 1, 3), derived=_derived,
)  # fmt: skip

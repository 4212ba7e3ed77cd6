"""The DMD gradient and the loss whose backward injects it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_fast.ops import _checks as check
from dmdr_fast.ops._library import define


class DMDGradient(NamedTuple):
    """What :func:`dmd_gradient` returns, all on x0's device.

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
    cfg_mode: str = "standard",
    prediction: str = "flow",
    normalizer: str = "per_sample",
    eps: float = 1e-8,
    eps_mode: str = "add",
    nan_policy: str = "zero",
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
    :func:`dmd_loss`.

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
        eps: >= 0; see ``eps_mode``. Unused with normalizer "none".
        eps_mode: "add": n + eps; "clamp": max(n, eps); "none": n as it is.
        nan_policy: for elements of g that are not finite in the output dtype.
            "zero": NaN and infinities become 0. "torch": torch.nan_to_num in the output dtype: NaN 0, +-inf
            the dtype's largest value. "zero_sample": the whole sample becomes 0. "keep": they stay.
        mask: bool or 0/1 tensor with x0's number of dimensions, each of size 1 or x0's. Means are over what
            it selects; g is 0 elsewhere. A sample it leaves empty gets g = 0.
        weight: extra factor of g, [B] or a number, finite.
        out_dtype: dtype of ``grad``; None means x0's.

    Returns:
        :class:`DMDGradient` (grad, weight, loss). The loss is the (masked) mean of g^2 / 2 after
        ``nan_policy``; 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument is not as described. Values inside tensors are read only on the CPU
            and outside torch.compile: there a non-finite cfg_scale, a negative sigma or a mask that selects
            nothing is an error.

    Source: DMD (arXiv 2311.18828, eq. 7 and 8), DMD2, FastGen, FastVideo, rCM: docs/drop-in.md has the call
    for each.
    """
    args = _checked(
        "dmd_gradient", x0, x_t, pred_fake, pred_real, pred_real_uncond, sigma, alpha, cfg_scale, cfg_mode,
        prediction, normalizer, eps, eps_mode, nan_policy, mask, weight, out_dtype, "mean", 0.5,
    )  # fmt: skip
    with torch.no_grad():
        grad, norm, loss, _ = _dmd_gradient_fwd(*args, False)
    return DMDGradient(grad, norm, loss)


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
    cfg_mode: str = "standard",
    prediction: str = "flow",
    normalizer: str = "per_sample",
    eps: float = 1e-8,
    eps_mode: str = "add",
    nan_policy: str = "zero",
    mask: Tensor | None = None,
    weight: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
    reduction: str = "mean",
    factor: float = 0.5,
) -> Tensor:
    r"""factor * mean(g^2) or factor * sum(g^2), with the gradient factor * 2 g / numel or factor * 2 g on x0.

    The drop-in for ``factor * mse_loss(x0, (x0 - g).detach())``: same value, same gradient, but g does not
    pass through a rounded pseudo-target (in bfloat16 that loses 6 % of g at rms(g) = 0.03). Only x0 gets a
    gradient; everything else is a constant, x_t included. The forward writes that gradient; a backward multiplies
    it by the incoming one, or hands it on as it is (on the CPU, incoming gradient 1, graph not retained).

    Args:
        x0, x_t, ..., weight: as in :func:`dmd_gradient`.
        out_dtype: dtype in which the gradient is kept for the backward; None means x0's. The result has x0's.
        reduction: "mean" (numel counts what the mask selects) or "sum".
        factor: finite; 0.5 in DMD and most trainers, rCM has 1 with "sum".

    Returns:
        0-d float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as :func:`dmd_gradient`.

    Source: DMD2 (arXiv 2405.14867), the loss of its public trainer; docs/drop-in.md.
    """
    args = _checked(
        "dmd_loss", x0, x_t, pred_fake, pred_real, pred_real_uncond, sigma, alpha, cfg_scale, cfg_mode,
        prediction, normalizer, eps, eps_mode, nan_policy, mask, weight, out_dtype, reduction, factor,
    )  # fmt: skip
    # The forward keeps d loss / d x0, or g where that cannot be: a masked mean's count is known after the pass only,
    # and float16 has no number as small as g / numel.
    scaled = (mask is None or reduction == "sum") and (out_dtype or x0.dtype) is not torch.float16
    return _dmd_gradient_fwd(*args, scaled)[2]


def _checked(
    op: str,
    x0: Tensor,
    x_t: Tensor,
    pred_fake: Tensor,
    pred_real: Tensor,
    pred_real_uncond: Tensor | None,
    sigma: Tensor | float,
    alpha: Tensor | float | None,
    cfg_scale: Tensor | float | None,
    cfg_mode: str,
    prediction: str,
    normalizer: str,
    eps: float,
    eps_mode: str,
    nan_policy: str,
    mask: Tensor | None,
    weight: Tensor | float | None,
    out_dtype: torch.dtype | None,
    reduction: str,
    factor: float,
) -> tuple:
    """The arguments of ``dmd_gradient_fwd``, but for ``scaled``."""
    check.floating(op, "x0", x0, min_dim=2)
    for name, value in (("x_t", x_t), ("pred_fake", pred_fake), ("pred_real", pred_real)):
        check.like(op, name, value, x0, "x0")
    if pred_real_uncond is not None:
        check.like(op, "pred_real_uncond", pred_real_uncond, x0, "x0")
    if (pred_real_uncond is None) != (cfg_scale is None):
        missing = "cfg_scale" if cfg_scale is None else "pred_real_uncond"
        raise ValueError(f"{op}: {missing}: expected with its counterpart (CFG needs both), got None")
    _check_options(op, cfg_mode, prediction, normalizer, eps_mode, nan_policy, reduction)
    out_dtype = x0.dtype if out_dtype is None else out_dtype
    check.dtype(op, "out_dtype", out_dtype)
    eps = float(check.number(op, "eps", eps, minimum=0))
    factor = float(check.number(op, "factor", factor))

    dtype = check.compute_dtype(x0, x_t, pred_fake, pred_real, pred_real_uncond)
    reads_alpha = prediction in ("eps", "v")
    largest = 1.0 if reads_alpha and alpha is None else math.inf  # alpha is then 1 - sigma
    sigma = check.per_sample(op, "sigma", sigma, x0, "x0", dtype, minimum=0, maximum=largest)
    if not reads_alpha:
        alpha = None
    elif alpha is not None:
        alpha = check.per_sample(op, "alpha", alpha, x0, "x0", dtype, minimum=0)
    # A number stays one: as a tensor it would cost a launch of its own.
    cfg_number, cfg_tensor = 1.0, None
    if isinstance(cfg_scale, Tensor):
        cfg_tensor = check.per_sample(op, "cfg_scale", cfg_scale, x0, "x0", dtype)
    elif cfg_scale is not None:
        cfg_number = float(check.number(op, "cfg_scale", cfg_scale))
    if weight is not None:
        weight = check.per_sample(op, "weight", weight, x0, "x0", dtype)
    if mask is not None:
        mask = _boolean_mask(op, mask, x0)
    return (
        x0, x_t, pred_fake, pred_real, pred_real_uncond, sigma, alpha, cfg_tensor, mask, weight, cfg_number,
        cfg_mode, prediction, normalizer, eps, eps_mode, nan_policy, out_dtype, reduction, factor,
    )  # fmt: skip


def _check_options(
    op: str, cfg_mode: str, prediction: str, normalizer: str, eps_mode: str, nan_policy: str, reduction: str
) -> None:
    check.choice(op, "cfg_mode", cfg_mode, ("standard", "offset"))
    check.choice(op, "prediction", prediction, ("flow", "eps", "v", "x0"))
    check.choice(op, "normalizer", normalizer, ("per_sample", "global", "none"))
    check.choice(op, "eps_mode", eps_mode, ("add", "clamp", "none"))
    check.choice(op, "nan_policy", nan_policy, ("zero", "torch", "zero_sample", "keep"))
    check.choice(op, "reduction", reduction, ("mean", "sum"))


def _boolean_mask(op: str, mask: Tensor, x0: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask: expected a tensor, got {type(mask).__name__}")
    if mask.dim() != x0.dim() or any(m != 1 and m != n for m, n in zip(mask.shape, x0.shape, strict=True)):
        raise ValueError(
            f"{op}: mask: expected {x0.dim()} dimensions, each 1 or x0's of {list(x0.shape)}, got {list(mask.shape)}"
        )
    check.on_device(op, "mask", mask, x0, "x0")
    mask = mask if mask.dtype is torch.bool else mask != 0
    check.selects_something(op, mask)
    return mask


def _save(ctx, inputs, output):
    grad, norm, _, loss_scale = output
    ctx.mark_non_differentiable(grad, norm, loss_scale)
    ctx.set_materialize_grads(False)  # else three zero tensors, one of x0's size, are made for every backward
    ctx.save_for_backward(grad, loss_scale)
    ctx.dtype, ctx.scaled = inputs[0].dtype, inputs[-1]


def _backward(ctx, grad_of_grad, grad_of_norm, grad_loss, grad_of_scale):
    grad, loss_scale = ctx.saved_tensors
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return (None,) * 21
    if ctx.scaled and grad.dtype is ctx.dtype and _is_one(grad_loss) and _reads_last():
        return grad, *[None] * 20
    return _dmd_loss_bwd(grad_loss, grad, loss_scale, ctx.dtype), *[None] * 20


def _is_one(number: Tensor) -> bool:
    """Whether a tensor that can be read without waiting (on the CPU, not traced) is 1."""
    return type(number) is Tensor and number.device.type == "cpu" and number.item() == 1


def _reads_last() -> bool:
    """Whether the running backward is the last one to read what was saved: then it can be handed on, not copied."""
    return not (torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())


def _fake_gradient(x0, x_t, pred_fake, pred_real, pred_real_uncond, *options):
    out_dtype = options[-4]
    compute = check.compute_dtype(x0, x_t, pred_fake, pred_real, pred_real_uncond)
    scalar = x0.new_empty((), dtype=compute)
    return (
        x0.new_empty(x0.shape, dtype=out_dtype),
        x0.new_empty(x0.shape[:1], dtype=compute),
        scalar,
        torch.empty_like(scalar),
    )


_dmd_loss_bwd = define(
    "dmd_loss_bwd(Tensor grad_loss, Tensor g, Tensor loss_scale, ScalarType dtype) -> Tensor",
    lambda grad_loss, g, loss_scale, dtype: g.new_empty(g.shape, dtype=dtype),
)
_dmd_gradient_fwd = define(
    "dmd_gradient_fwd(Tensor x0, Tensor x_t, Tensor pred_fake, Tensor pred_real, Tensor? pred_real_uncond, "
    "Tensor sigma, Tensor? alpha, Tensor? cfg_tensor, Tensor? mask, Tensor? weight, float cfg_scale, "
    "str cfg_mode, str prediction, str normalizer, float eps, str eps_mode, str nan_policy, "
    "ScalarType out_dtype, str reduction, float factor, bool scaled) "
    "-> (Tensor grad, Tensor normalizer, Tensor loss, Tensor loss_scale)",
    _fake_gradient,
    setup_context=_save,
    backward=_backward,
)

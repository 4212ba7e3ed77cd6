"""The DMD gradient: guidance, normaliser, NaN policy and loss.

    g = weight gain (fake - real) / n,   n = mean |x0 - keep x_t - gain real|

where keep and gain turn a prediction into a denoised sample, x0_hat = keep x_t + gain prediction. A sample that fits
in a block is read once. Larger ones are read for n and again for g, the second time from the end, which is still in
the L2 cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import load_sample, store_sample


class Latents(NamedTuple):
    """Views of what the gradient is made from; uncond and mask may be None."""

    x0: Any
    x_t: Any
    fake: Any
    real: Any
    uncond: Any
    mask: Any


class Scalars(NamedTuple):
    """One float32 per sample each; all but sigma may be None. ``cfg_number`` serves where ``cfg`` is None.

    ``eps`` and ``written``, what multiplies g as it is written, are numbers for all samples.
    """

    sigma: Any
    alpha: Any
    cfg: Any
    weight: Any
    cfg_number: Any
    eps: Any
    written: Any


class Options(NamedTuple):
    """What a kernel is compiled for: the options of ``ops.dmd_gradient`` and the largest number of its result."""

    prediction: Any
    cfg_mode: Any
    normalizer: Any
    eps_mode: Any
    nan_policy: Any
    largest: Any


@triton.jit
def dmd_gradient_sample_kernel(
    latents, scalars, grad, norms, squares, counts, shape, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per sample, all of it in registers: every tensor is read or written once; grad = written g."""
    sample = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    keep, gain = _denoiser(scalars, sample, OPTIONS)
    real, difference, on = _difference(latents, scalars, shape, sample, i, OPTIONS)
    selected = tl.full([], shape.count, tl.int32)
    if latents.mask is not None:
        selected = tl.sum(on.to(tl.int32))
    norm = tl.full([], 1.0, tl.float32)
    if OPTIONS.normalizer != "none":
        distance = tl.sum(_distance(latents, real, keep, gain, shape, sample, i, on, OPTIONS))
        norm = _norm(distance, selected, scalars.eps, OPTIONS)
    g, broken = _policy(_scale(gain, norm, scalars, sample) * difference, on, grad.dtype.element_ty, OPTIONS)
    if OPTIONS.nan_policy == "zero_sample":
        g = tl.where(tl.max(broken.to(tl.int32)) == 0, g, 0.0)
    store_sample(grad, shape, sample, i, scalars.written * g, i < shape.count)
    tl.store(norms + sample, norm)
    tl.store(squares + sample, tl.sum(g * g))
    if latents.mask is not None:
        tl.store(counts + sample, selected)


@triton.jit
def dmd_distance_kernel(
    latents, scalars, distances, counts, shape, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First reading of large samples: distances[b, p] = sum |x0 - x0_real| and counts[b, p] of what program p read."""
    sample, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    keep, gain = _denoiser(scalars, sample, OPTIONS)
    total = tl.zeros([BLOCK], tl.float32)
    selected = tl.zeros([BLOCK], tl.int32)
    for start in range(part * BLOCK, shape.count, parts * BLOCK):
        i = start + tl.arange(0, BLOCK)
        on = _selected(latents, shape, sample, i)
        real = _real(latents, scalars, shape, sample, i, on, OPTIONS)
        total += _distance(latents, real, keep, gain, shape, sample, i, on, OPTIONS)
        selected += on.to(tl.int32)
    tl.store(distances + sample * parts + part, tl.sum(total))
    tl.store(counts + sample * parts + part, tl.sum(selected))


@triton.jit
def dmd_norm_kernel(distances, counts, norms, samples, parts, eps, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """The normalisers from the partial sums: one program per sample, or one for all of them."""
    first = tl.program_id(0).to(tl.int64) * parts
    distance = tl.zeros([BLOCK], tl.float32)
    selected = tl.zeros([BLOCK], tl.int64)
    for start in range(0, parts, BLOCK):
        i = start + tl.arange(0, BLOCK)
        distance += tl.load(distances + first + i, mask=i < parts, other=0)
        selected += tl.load(counts + first + i, mask=i < parts, other=0)
    norm = _norm(tl.sum(distance), tl.sum(selected), eps, OPTIONS)
    for start in range(0, samples, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(norms + tl.program_id(0) + i, norm + tl.zeros([BLOCK], tl.float32), mask=i < samples)


@triton.jit
def dmd_gradient_kernel(
    latents, scalars, grad, norms, squares, counts, broken, shape, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Second reading: grad = written g. broken[b, p] says that program p met an element that is not finite."""
    sample, parts = tl.program_id(0), tl.num_programs(1)
    part = parts - 1 - tl.program_id(1)
    _keep, gain = _denoiser(scalars, sample, OPTIONS)
    norm = tl.load(norms + sample) if OPTIONS.normalizer != "none" else 1.0
    scale = _scale(gain, norm, scalars, sample)
    total = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    selected = tl.zeros([BLOCK], tl.int32)
    for start in range(part * BLOCK, shape.count, parts * BLOCK):
        i = start + tl.arange(0, BLOCK)
        _real_prediction, difference, on = _difference(latents, scalars, shape, sample, i, OPTIONS)
        g, not_finite = _policy(scale * difference, on, grad.dtype.element_ty, OPTIONS)
        store_sample(grad, shape, sample, i, scalars.written * g, i < shape.count)
        total = tl.fma(g, g, total)
        bad |= not_finite.to(tl.int32)
        selected += on.to(tl.int32)
    tl.store(squares + sample * parts + part, tl.sum(total))
    if latents.mask is not None:
        tl.store(counts + sample * parts + part, tl.sum(selected))
    if OPTIONS.nan_policy == "zero_sample":
        tl.store(broken + sample * parts + part, tl.max(bad))


@triton.jit
def dmd_zero_samples_kernel(grad, squares, broken, shape, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the samples in which an element was not finite, and their squares."""
    sample, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p = tl.arange(0, PARTS)
    if tl.max(tl.load(broken + sample * parts + p, mask=p < parts, other=0)) != 0:
        for start in range(part * BLOCK, shape.count, parts * BLOCK):
            i = start + tl.arange(0, BLOCK)
            store_sample(grad, shape, sample, i, tl.zeros([BLOCK], tl.float32), i < shape.count)
        tl.store(squares + sample * parts + part, 0.0)


@triton.jit
def dmd_loss_kernel(
    squares, counts, loss, loss_scale, parts, total_count, factor, MEAN: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = factor * (mean or sum of g^2) and loss_scale = 2 factor (/ count), by one program in a fixed order.

    SCALED: grad has that factor already, loss_scale = 1.
    """
    total = tl.zeros([BLOCK], tl.float32)
    selected = tl.zeros([BLOCK], tl.int64)
    for start in range(0, parts, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(squares + i, mask=i < parts, other=0)
        if counts is not None:
            selected += tl.load(counts + i, mask=i < parts, other=0)
    scale = 2.0 * factor
    if MEAN:
        count = total_count if counts is None else tl.sum(selected).to(tl.float32)
        scale = tl.div_rn(scale, tl.maximum(count, 1.0))
    tl.store(loss_scale, 1.0 if SCALED else scale)
    tl.store(loss, tl.sum(total) * (0.5 * scale))


@triton.jit
def dmd_loss_bwd_kernel(grad_loss, g, loss_scale, out, shape, BLOCK: tl.constexpr):
    """out = (grad_loss loss_scale) g."""
    sample = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = i < shape.count
    scale = tl.load(grad_loss).to(tl.float32) * tl.load(loss_scale)
    store_sample(out, shape, sample, i, scale * load_sample(g, shape, sample, i, on), on)


@triton.jit
def _denoiser(scalars, sample, OPTIONS: tl.constexpr):
    """(keep, gain) of x0_hat = keep x_t + gain prediction; keep is unused where the prediction is x0_hat."""
    sigma = tl.load(scalars.sigma + sample)
    keep = tl.full([], 1.0, tl.float32)
    gain = -sigma
    if OPTIONS.prediction == "x0":
        gain = keep
    if OPTIONS.prediction == "eps" or OPTIONS.prediction == "v":
        alpha = 1.0 - sigma if scalars.alpha is None else tl.load(scalars.alpha + sample)
        if OPTIONS.prediction == "v":
            keep = alpha
        else:
            keep, gain = tl.div_rn(keep, alpha), tl.div_rn(gain, alpha)
    return keep, gain


@triton.jit
def _selected(latents, shape, sample, i):
    on = i < shape.count
    if latents.mask is not None:
        on &= load_sample(latents.mask, shape, sample, i, on) != 0
    return on


@triton.jit
def _real(latents, scalars, shape, sample, i, on, OPTIONS: tl.constexpr):
    """The real score's prediction with guidance."""
    real = load_sample(latents.real, shape, sample, i, on)
    if latents.uncond is not None:
        scale = scalars.cfg_number if scalars.cfg is None else tl.load(scalars.cfg + sample)
        uncond = load_sample(latents.uncond, shape, sample, i, on)
        base = uncond if OPTIONS.cfg_mode == "standard" else real
        real = tl.fma(real - uncond, scale, base)
    return real


@triton.jit
def _difference(latents, scalars, shape, sample, i, OPTIONS: tl.constexpr):
    """(real, fake - real, which elements count)."""
    on = _selected(latents, shape, sample, i)
    real = _real(latents, scalars, shape, sample, i, on, OPTIONS)
    return real, load_sample(latents.fake, shape, sample, i, on) - real, on


@triton.jit
def _distance(latents, real, keep, gain, shape, sample, i, on, OPTIONS: tl.constexpr):
    """|x0 - x0_real|, 0 where an element does not count."""
    distance = load_sample(latents.x0, shape, sample, i, on)
    if OPTIONS.prediction != "x0":
        # x0 and x_t are close at small sigma: their difference first.
        x_t = load_sample(latents.x_t, shape, sample, i, on)
        distance = tl.fma(x_t, -keep, distance)
    distance = tl.fma(real, -gain, distance)
    return tl.where(on, tl.abs(distance), 0.0)


@triton.jit
def _norm(distance, selected, eps, OPTIONS: tl.constexpr):
    mean = tl.div_rn(distance, tl.maximum(selected.to(tl.float32), 1.0))
    if OPTIONS.eps_mode == "add":
        mean += eps
    if OPTIONS.eps_mode == "clamp":
        mean = tl.maximum(mean, eps, propagate_nan=tl.PropagateNan.ALL)
    return mean


@triton.jit
def _scale(gain, norm, scalars, sample):
    """weight gain / norm."""
    scale = tl.div_rn(gain, norm)
    if scalars.weight is not None:
        scale = tl.load(scalars.weight + sample) * scale
    return scale


@triton.jit
def _policy(g, on, dtype: tl.constexpr, OPTIONS: tl.constexpr):
    """(g as the NaN policy wants it, 0 where it does not count; which elements are not finite once rounded)."""
    g = tl.where(on, g, 0.0)
    # False for NaN too.
    finite = tl.abs(g.to(dtype).to(tl.float32)) <= OPTIONS.largest
    if OPTIONS.nan_policy == "zero":
        g = tl.where(finite, g, 0.0)
    if OPTIONS.nan_policy == "torch":
        largest = tl.where(g > 0, OPTIONS.largest, tl.where(g < 0, -OPTIONS.largest, 0.0))
        g = tl.where(finite, g, largest)
    return g, finite == 0

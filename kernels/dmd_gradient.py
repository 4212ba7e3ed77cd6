"""The DMD gradient: guidance, normaliser, NaN policy and loss.

    g = weight gain (fake - real) / n,   n = mean |x0 - keep x_t - gain real|

where keep and gain turn a prediction into a denoised sample, x0_hat = keep x_t + gain prediction. A sample that fits
in a block is read once, in one launch. Larger ones are read for n and again for g, the second time from the end, which
is still in the L2 cache: two launches. What is a sum over programs (n, the loss) the last of them to arrive adds up,
in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import load_sample, store_sample
from dmdr_fast.kernels.sums import last_to_arrive


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
    """What a kernel is compiled for: the options of ``ops.dmd_loss``, and the largest number of its gradient's dtype.

    ``scaled``: g is written with the loss's factor, and loss_scale is 1.
    """

    prediction: Any
    cfg_mode: Any
    normalizer: Any
    eps_mode: Any
    nan_policy: Any
    reduction: Any
    scaled: Any
    largest: Any


class Parts(NamedTuple):
    """What each program finds, [samples, programs of a sample]: sums of g^2 and of |x0 - x0_real|, which are float32;
    how many elements count, and whether one of g was not finite, which are int32. Any may be None but the first."""

    squares: Any
    distances: Any
    counts: Any
    broken: Any


class Totals(NamedTuple):
    """What is a sum over programs.

    Attributes:
        norms: [samples] float32.
        loss, loss_scale: 0-d float32.
        arrived: int32 counters, 0 between launches: one for all programs, then one per sample.
        elements: of all samples.
        factor: of the loss.
    """

    norms: Any
    loss: Any
    loss_scale: Any
    arrived: Any
    elements: Any
    factor: Any


@triton.jit
def dmd_gradient_sample_kernel(
    latents, scalars, grad, parts, totals, shape, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
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
    tl.store(totals.norms + sample, norm)
    tl.store(parts.squares + sample, tl.sum(g * g))
    if latents.mask is not None:
        tl.store(parts.counts + sample, selected)
    if last_to_arrive(totals.arrived, tl.num_programs(0)):
        _write_loss(parts, totals, tl.num_programs(0), latents.mask is not None, OPTIONS)


@triton.jit
def dmd_distance_kernel(
    latents, scalars, parts, totals, shape, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First reading of large samples: the sums and counts of what each program reads, and of them the norms."""
    sample, part, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    keep, gain = _denoiser(scalars, sample, OPTIONS)
    total = tl.zeros([BLOCK], tl.float32)
    selected = tl.zeros([BLOCK], tl.int32)
    for start in range(part * BLOCK, shape.count, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        on = _selected(latents, shape, sample, i)
        real = _real(latents, scalars, shape, sample, i, on, OPTIONS)
        total += _distance(latents, real, keep, gain, shape, sample, i, on, OPTIONS)
        selected += on.to(tl.int32)
    tl.store(parts.distances + sample * programs + part, tl.sum(total))
    tl.store(parts.counts + sample * programs + part, tl.sum(selected))
    if last_to_arrive(totals.arrived + 1 + sample, programs):
        if OPTIONS.normalizer == "per_sample":
            _write_norms(parts, totals, sample, 1, programs, scalars.eps, OPTIONS)
        elif last_to_arrive(totals.arrived, tl.num_programs(0)):
            _write_norms(parts, totals, sample * 0, tl.num_programs(0), programs, scalars.eps, OPTIONS)


@triton.jit
def dmd_gradient_kernel(
    latents, scalars, grad, parts, totals, shape, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Second reading: grad = written g, and the loss."""
    sample, programs = tl.program_id(0), tl.num_programs(1)
    part = programs - 1 - tl.program_id(1)
    _keep, gain = _denoiser(scalars, sample, OPTIONS)
    norm = tl.full([], 1.0, tl.float32)
    if OPTIONS.normalizer == "none":
        tl.store(totals.norms + sample, norm)
    else:
        norm = tl.load(totals.norms + sample)
    scale = _scale(gain, norm, scalars, sample)
    total = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    selected = tl.zeros([BLOCK], tl.int32)
    for start in range(part * BLOCK, shape.count, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        _real_prediction, difference, on = _difference(latents, scalars, shape, sample, i, OPTIONS)
        g, not_finite = _policy(scale * difference, on, grad.dtype.element_ty, OPTIONS)
        store_sample(grad, shape, sample, i, scalars.written * g, i < shape.count)
        total = tl.fma(g, g, total)
        bad |= not_finite.to(tl.int32)
        selected += on.to(tl.int32)
    tl.store(parts.squares + sample * programs + part, tl.sum(total))
    if latents.mask is not None:
        tl.store(parts.counts + sample * programs + part, tl.sum(selected))
    if OPTIONS.nan_policy == "zero_sample":
        tl.store(parts.broken + sample * programs + part, tl.max(bad))
    if last_to_arrive(totals.arrived + 1 + sample, programs):
        if OPTIONS.nan_policy == "zero_sample":
            _zero_if_broken(grad, parts, shape, sample, programs, BLOCK)
        if last_to_arrive(totals.arrived, tl.num_programs(0)):
            _write_loss(parts, totals, tl.num_programs(0) * programs, latents.mask is not None, OPTIONS)


@triton.jit
def _write_norms(parts, totals, sample, samples, programs, eps, OPTIONS: tl.constexpr):
    """The normaliser over ``samples`` samples from ``sample`` on, for each of them."""
    first = sample.to(tl.int64) * programs
    distance = tl.zeros([256], tl.float32)
    selected = tl.zeros([256], tl.int64)
    for start in range(0, samples * programs, 256):
        i = start + tl.arange(0, 256)
        distance += tl.load(parts.distances + first + i, mask=i < samples * programs, other=0)
        selected += tl.load(parts.counts + first + i, mask=i < samples * programs, other=0)
    norm = _norm(tl.sum(distance), tl.sum(selected), eps, OPTIONS)
    for start in range(0, samples, 256):
        i = start + tl.arange(0, 256)
        tl.store(totals.norms + sample + i, norm + tl.zeros([256], tl.float32), mask=i < samples)


@triton.jit
def _zero_if_broken(grad, parts, shape, sample, programs, BLOCK: tl.constexpr):
    """Zero a sample in which an element was not finite, and its squares. One program does it: that is rare."""
    first = sample * programs
    broken = tl.zeros([256], tl.int32)
    for start in range(0, programs, 256):
        i = start + tl.arange(0, 256)
        broken |= tl.load(parts.broken + first + i, mask=i < programs, other=0)
    if tl.max(broken) != 0:
        for start in range(0, shape.count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            store_sample(grad, shape, sample, i, tl.zeros([BLOCK], tl.float32), i < shape.count)
        for start in range(0, programs, 256):
            i = start + tl.arange(0, 256)
            tl.store(parts.squares + first + i, tl.zeros([256], tl.float32), mask=i < programs)


@triton.jit
def _write_loss(parts, totals, programs, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """loss = factor * (mean or sum of g^2) and loss_scale = 2 factor (/ count)."""
    total = tl.zeros([1024], tl.float32)
    selected = tl.zeros([1024], tl.int64)
    for start in range(0, programs, 1024):
        i = start + tl.arange(0, 1024)
        total += tl.load(parts.squares + i, mask=i < programs, other=0)
        if MASKED:
            selected += tl.load(parts.counts + i, mask=i < programs, other=0)
    scale = 2.0 * totals.factor
    if OPTIONS.reduction == "mean":
        count = tl.sum(selected).to(tl.float32) if MASKED else totals.elements
        scale = tl.div_rn(scale, tl.maximum(count, 1.0))
    tl.store(totals.loss_scale, 1.0 if OPTIONS.scaled else scale)
    tl.store(totals.loss, tl.sum(total) * (0.5 * scale))


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

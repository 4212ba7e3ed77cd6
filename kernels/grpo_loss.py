"""The clipped policy loss over log-probabilities, and its gradient.

There is one number per sample, so it is computed in float64: the ratio's distance from 1 decides, and it is 1e-5.
"""

import triton
import triton.language as tl


@triton.jit
def grpo_loss_kernel(
    logprob, old_logprob, advantage, loss, stats, count, clip_low, clip_high, adv_clip, BLOCK: tl.constexpr
):  # fmt: skip
    """loss and [mean ratio, max |ratio - 1|, clipped fraction, mean (logprob - old)^2 / 2], by one program."""
    losses = tl.zeros([BLOCK], tl.float64)
    ratios = tl.zeros([BLOCK], tl.float64)
    deviation = tl.zeros([BLOCK], tl.float64)
    outside = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        on = i < count
        ratio, within, change, weight = _terms(
            logprob, old_logprob, advantage, i, on, clip_low, clip_high, adv_clip
        )  # fmt: skip
        loss_of = tl.maximum(weight * ratio, weight * within, propagate_nan=tl.PropagateNan.ALL)
        losses += tl.where(on, loss_of, 0.0)
        ratios += tl.where(on, ratio, 0.0)
        deviation = tl.maximum(deviation, tl.where(on, tl.abs(ratio - 1.0), 0.0), propagate_nan=tl.PropagateNan.ALL)
        outside += tl.where(on & (ratio != within), 1.0, 0.0)
        squares += tl.where(on, change * change, 0.0)
    total = tl.cast(count, tl.float64)
    tl.store(loss, (tl.sum(losses) / total).to(tl.float32))
    tl.store(stats, (tl.sum(ratios) / total).to(tl.float32))
    tl.store(stats + 1, tl.max(deviation).to(tl.float32))
    tl.store(stats + 2, (tl.sum(outside) / total).to(tl.float32))
    tl.store(stats + 3, (tl.sum(squares) / (2 * total)).to(tl.float32))


@triton.jit
def grpo_loss_bwd_kernel(
    grad_loss, logprob, old_logprob, advantage, grad, count, clip_low, clip_high, adv_clip, BLOCK: tl.constexpr
):  # fmt: skip
    """-A ratio / count where the unclipped term is the larger one, else 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = i < count
    ratio, within, _change, weight = _terms(logprob, old_logprob, advantage, i, on, clip_low, clip_high, adv_clip)
    slope = tl.load(grad_loss).to(tl.float64) / tl.cast(count, tl.float64)
    value = tl.where(weight * ratio >= weight * within, weight * ratio, 0.0) * slope
    tl.store(grad + i, value.to(grad.dtype.element_ty), mask=on)


@triton.jit
def _terms(logprob, old_logprob, advantage, i, on, clip_low, clip_high, adv_clip):
    """(ratio, ratio clipped, the ratio's logarithm, -A) in float64."""
    new = tl.load(logprob + i, mask=on, other=0).to(tl.float64)
    change = new - tl.load(old_logprob + i, mask=on, other=0).to(tl.float64)
    ratio = tl.exp(change)
    within = _clamped(ratio, 1.0 - tl.cast(clip_low, tl.float64), 1.0 + tl.cast(clip_high, tl.float64))
    limit = tl.cast(adv_clip, tl.float64)
    weight = -_clamped(tl.load(advantage + i, mask=on, other=0).to(tl.float64), -limit, limit)
    return ratio, within, change, weight


@triton.jit
def _clamped(value, low, high):
    """NaN stays NaN."""
    raised = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)

"""One SDE step x' = a x + b v + s n of a flow model, its log-probability, and the gradients.

A drawn sample is first written, rounded, and then read like a given one: the log-probability of a rollout and that of
its replay come from the same kernel and have the same bits. Squares are added in float64, so they also agree when the
replay's tensors are aligned or strided differently: the ratio of two policies differs from 1 by 1e-5 only.
"""

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import load_sample, store_sample
from dmdr_fast.kernels.normals import seeded_normals
from dmdr_fast.kernels.renoise import sample_window


@triton.jit
def sde_draw_kernel(
    x, v, sigma, sigma_next, seed, drawn, shape, offset, eta, cosine, sine,
    KIND: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """drawn = mean + s n, rounded; one program per sample and window of the stream."""
    sample = tl.program_id(0)
    window, i, on = sample_window(sample, shape.count, offset, BLOCK)
    a, b, s = coefficients(sigma, sigma_next, sample, eta, cosine, sine, KIND)
    mean = _mean(a, b, load_sample(x, shape, sample, i, on), load_sample(v, shape, sample, i, on))
    value = tl.fma(seeded_normals(window, seed, BLOCK, GROUP), s, mean)
    store_sample(drawn, shape, sample, i, value, on)


@triton.jit
def sde_square_kernel(
    x, v, next_sample, sigma, sigma_next, mean, parts, shape, eta, cosine, sine,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean, and parts[b, block] = sum (x' - mean)^2."""
    sample, block = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    on = i < shape.count
    a, b, _std = coefficients(sigma, sigma_next, sample, eta, cosine, sine, KIND)
    expected = _mean(a, b, load_sample(x, shape, sample, i, on), load_sample(v, shape, sample, i, on))
    store_sample(mean, shape, sample, i, expected, on)
    distance = tl.where(on, load_sample(next_sample, shape, sample, i, on) - expected, 0.0).to(tl.float64)
    tl.store(parts + sample * tl.num_programs(1) + block, tl.sum(distance * distance))


@triton.jit
def sde_logprob_kernel(
    parts, sigma, sigma_next, logprob, std, blocks, count, eta, cosine, sine,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The log-probability of a sample from its sums of squares; one program per sample."""
    sample = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts + sample.to(tl.int64) * blocks + i, mask=i < blocks, other=0)
    _a, _b, s = coefficients(sigma, sigma_next, sample, eta, cosine, sine, KIND)
    square = tl.sum(total) / tl.cast(count, tl.float64)
    if KIND == "cps":
        value = -square
    else:
        wide = s.to(tl.float64)
        value = -square / (2 * wide * wide) - tl.log(wide) - 0.9189385332046727  # log(2 pi) / 2
    tl.store(logprob + sample, value.to(tl.float32))
    tl.store(std + sample, s)


@triton.jit
def sde_step_bwd_kernel(
    grad_next, grad_logprob, grad_mean, x, v, next_sample, sigma, sigma_next, grad_x, grad_v, shape, count,
    eta, cosine, sine, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x = a m, grad_v = b m with m the gradient of the mean."""
    sample = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = i < shape.count
    a, b, s = coefficients(sigma, sigma_next, sample, eta, cosine, sine, KIND)
    m = tl.zeros([BLOCK], tl.float32)
    if grad_next is not None:
        m += load_sample(grad_next, shape, sample, i, on)
    if grad_mean is not None:
        m += load_sample(grad_mean, shape, sample, i, on)
    if grad_logprob is not None:
        expected = _mean(a, b, load_sample(x, shape, sample, i, on), load_sample(v, shape, sample, i, on))
        slope = tl.load(grad_logprob + sample).to(tl.float32)
        slope = 2.0 * slope if KIND == "cps" else tl.div_rn(slope, s * s)
        distance = load_sample(next_sample, shape, sample, i, on) - expected
        m = tl.fma(distance, tl.div_rn(slope, count), m)
    if grad_x is not None:
        store_sample(grad_x, shape, sample, i, a * m, on)
    if grad_v is not None:
        store_sample(grad_v, shape, sample, i, b * m, on)


@triton.jit
def coefficients(sigma, sigma_next, sample, eta, cosine, sine, KIND: tl.constexpr):
    """(a, b, s) of a sample; ``cosine`` and ``sine`` are those of eta pi / 2."""
    now, then = tl.load(sigma + sample), tl.load(sigma_next + sample)
    if KIND == "cps":
        keep = then * cosine
        return (1.0 - then) + keep, (1.0 - now) * keep - now * (1.0 - then), then * sine
    else:
        dt = then - now
        gamma = eta + now * 0.0
        if KIND == "flow_grpo":
            gamma = eta * tl.sqrt_rn(tl.div_rn(now, 1.0 - tl.where(now == 1.0, then, now)))
        drift = tl.div_rn(gamma * gamma, 2.0 * now)
        return tl.fma(drift, dt, 1.0), dt * tl.fma(drift, 1.0 - now, 1.0), gamma * tl.sqrt_rn(-dt)


@triton.jit
def _mean(a, b, x, v):
    return tl.fma(x, a, v * b)

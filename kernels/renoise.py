"""Renoising x_t = alpha_b x0 + sigma_b noise, with the noise given or drawn in the kernel, and its gradients."""

import triton
import triton.language as tl

from dmdr_fast.kernels.elements import load_sample, store_as, store_sample
from dmdr_fast.kernels.normals import seeded_normals


@triton.jit
def renoise_kernel(x0, noise, alpha, sigma, out, shape, BLOCK: tl.constexpr):
    """One program per sample and BLOCK elements."""
    sample = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = i < shape.count
    x = load_sample(x0, shape, sample, i, on)
    z = load_sample(noise, shape, sample, i, on)
    x_t = tl.fma(tl.load(sigma + sample), z, tl.load(alpha + sample) * x)
    store_sample(out, shape, sample, i, x_t, on)


@triton.jit
def seeded_renoise_kernel(
    x0, seed, alpha, sigma, out, shape, offset, BLOCK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """One program per sample and window of the stream that the sample touches."""
    sample = tl.program_id(0)
    window, i, on = sample_window(sample, shape.count, offset, BLOCK)
    x = load_sample(x0, shape, sample, i, on)
    z = seeded_normals(window, seed, BLOCK, GROUP)
    x_t = tl.fma(tl.load(sigma + sample), z, tl.load(alpha + sample) * x)
    store_sample(out, shape, sample, i, x_t, on)


@triton.jit
def sample_window(sample, count, offset, BLOCK: tl.constexpr):
    """(number of the window, its elements as indices into the sample, which of them are inside).

    The sample is the elements offset + sample * count .. of the stream; program_id(1) counts its windows.
    """
    first = sample.to(tl.int64) * count + offset
    window = first // BLOCK + tl.program_id(1)
    i = (window * BLOCK - first).to(tl.int32) + tl.arange(0, BLOCK)
    # Unsigned: one comparison for both ends.
    return window, i, i.to(tl.uint32) < count


@triton.jit
def normal_noise_kernel(seed, out, count, offset, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """One program per window that the elements offset .. offset + count - 1 touch."""
    window = offset // BLOCK + tl.program_id(0).to(tl.int64)
    i = window * BLOCK - offset + tl.arange(0, BLOCK)
    store_as(out + i, seeded_normals(window, seed, BLOCK, GROUP), (i >= 0) & (i < count))


@triton.jit
def scaled_kernel(grad, scale, out, shape, BLOCK: tl.constexpr):
    """out = scale_b grad: the gradient of x0 (scale = alpha) or of the noise (scale = sigma)."""
    sample = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = i < shape.count
    value = tl.load(scale + sample) * load_sample(grad, shape, sample, i, on)
    store_sample(out, shape, sample, i, value, on)


@triton.jit
def product_sums_kernel(grad, factor, parts, shape, BLOCK: tl.constexpr):
    """parts[b, block] = sum of grad * factor over the block."""
    sample, block = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    on = i < shape.count
    product = load_sample(grad, shape, sample, i, on) * load_sample(factor, shape, sample, i, on)
    tl.store(parts + sample * tl.num_programs(1) + block, tl.sum(product))

"""Seeded standard normals inside a kernel: Philox4x32-10 and Box-Muller.

The stream is the one that ``dmdr_fast.ops.normal_noise`` documents. All arithmetic is written out (shifts,
fused multiply-adds, one rsqrt with a Newton step), so the bits do not depend on a maths library or on the
compiler's fusion. Over all 2^24 radii and all 2^24 angles the normals are within 9.7e-7 of the exact ones.
"""

import os

import triton
import triton.language as tl

# The interpreter knows no PTX. Triton reads the variable when it is imported.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def seeded_normals(window, seed, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """float32 [COUNT]: the elements window * COUNT .. (window + 1) * COUNT - 1 of the stream.

    Windows start at multiples of COUNT, so a block's number is an OR away from its window's first: the counter's
    upper words stay scalars, which saves 2 instructions per element. GROUP (4 or 8) consecutive elements end up
    in one thread, which is what a 16-byte access of 4- or 2-byte elements wants: no exchange between threads.
    """
    tl.static_assert(GROUP == 4 or GROUP == 8)
    key = tl.load(seed).to(tl.uint64)
    stream = tl.load(seed + 1).to(tl.uint64)
    first = window.to(tl.uint64) * (COUNT // 4)
    block = first.to(tl.uint32) + (tl.arange(0, COUNT // GROUP) * (GROUP // 4)).to(tl.uint32)
    upper = (first >> 32).to(tl.uint32)
    z0, z1, z2, z3 = _normals_of_block(block, upper, key, stream)
    if GROUP == 4:
        even, odd = tl.join(z0, z2), tl.join(z1, z3)
    else:
        w0, w1, w2, w3 = _normals_of_block(block + 1, upper, key, stream)
        even = tl.join(tl.join(z0, w0), tl.join(z2, w2))
        odd = tl.join(tl.join(z1, w1), tl.join(z3, w3))
    return tl.reshape(tl.join(even, odd), [COUNT])


@triton.jit
def _normals_of_block(block, upper, key, stream):
    """The four normals of each block, lane by lane."""
    c0, c1, c2, c3 = block, upper, stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        even_high, even_low = _wide_product(c0, 0xD2511F53)
        odd_high, odd_low = _wide_product(c2, 0xCD9E8D57)
        c0, c1 = odd_high ^ c1 ^ k0, odd_low
        c2, c3 = even_high ^ c3 ^ k1, even_low
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    z0, z1 = _box_muller(c0, c1)
    z2, z3 = _box_muller(c2, c3)
    return z0, z1, z2, z3


@triton.jit
def _wide_product(word, FACTOR: tl.constexpr):
    """The upper and the lower 32 bits of ``word * FACTOR``.

    One 32x32->64 multiplication instead of a high and a low one: 5 instructions per element less than tl.philox. In
    PTX, since LLVM takes such a product apart where its halves are used (3.5 instructions per element, Triton 3.7).
    """
    if _INTERPRETED:
        product = word.to(tl.uint64) * FACTOR
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r", [word, FACTOR], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _box_muller(a, b):
    """sqrt(-2 ln u) (cos, sin)(2 pi theta) of two words."""
    radius = box_muller_radius(a)
    # theta in quarter turns around the nearest multiple of one, by way of the mantissa of [1, 2): exact.
    turn = (((b >> 7) & 0x7FFFFE) ^ 0x3FC00000).to(tl.float32, bitcast=True) - 1.5
    square = turn * turn
    # Minimax on |turn| <= 1/2, relative error 2.8e-8 (sin) and 3.9e-8 (cos).
    sin = tl.fma(square, -0.004685971885919571, 0.07971252501010895)
    sin = tl.fma(sin, square, -0.645966649055481)
    sin = tl.fma(sin, square, 1.5707963705062866) * turn
    cos = tl.fma(square, -0.020414529368281364, 0.25360238552093506)
    cos = tl.fma(cos, square, -1.2336976528167725)
    cos = tl.fma(cos, square, 1.0)
    # Bit 31 of the rounded quadrant turns by half a circle, bit 30 by a quarter.
    quadrant = b + 0x20000000
    quarter = (quadrant & 0x40000000) != 0
    radius = (radius.to(tl.uint32, bitcast=True) ^ (quadrant & 0x80000000)).to(tl.float32, bitcast=True)
    # -1.0 * x is a sign of an operand; Triton's -x is a subtraction, one instruction.
    return radius * tl.where(quarter, -1.0 * sin, cos), radius * tl.where(quarter, cos, sin)


@triton.jit
def box_muller_radius(a):
    """sqrt(-2 ln u) of u = ((a >> 8) + 1) 2^-24, relatively exact next to u = 1 too."""
    bits = ((a >> 8).to(tl.int32, bitcast=True).to(tl.float32) + 1.0).to(tl.int32, bitcast=True)
    # u 2^24 = 2^e m with m in [sqrt(1/2), sqrt(2)); e - 24 stays in place, in the exponent's bits.
    exponent = (bits - 0x4B3504F3) & -0x800000
    f = (bits - exponent - 0xC000000).to(tl.float32, bitcast=True) - 1.0
    # -2 ln(1 + f) / f, minimax, relative error 3.0e-8.
    p = tl.fma(f, -0.17477664351463318, 0.2861548364162445)
    p = tl.fma(p, f, -0.2983270585536957)
    p = tl.fma(p, f, 0.33140623569488525)
    p = tl.fma(p, f, -0.3992447853088379)
    p = tl.fma(p, f, 0.5000355243682861)
    p = tl.fma(p, f, -0.6666789054870605)
    p = tl.fma(p, f, 0.9999998211860657)
    p = tl.fma(p, f, -2.0)
    # -2 ln 2 2^-23 times the exponent; 1e-30 keeps rsqrt finite at u = 1.
    square = tl.fma(exponent.to(tl.float32), -1.6525916589735634e-07, tl.fma(f, p, 1e-30))
    inverse = tl.rsqrt(square)
    radius = square * inverse
    # One Newton step: the hardware's rsqrt alone is off by up to 7e-7 at radius 5.8.
    return tl.fma(0.5 * inverse, tl.fma(-1.0 * radius, radius, square), radius)

"""A kernel that shows the radius inside the seeded normals."""

import triton
import triton.language as tl

import dmdr_fast.backends.triton  # noqa: F401  makes dmdr_fast.kernels importable in a checkout
from dmdr_fast.kernels.normals import box_muller_radius


@triton.jit
def radius_kernel(words, radii, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(radii + i, box_muller_radius(tl.load(words + i).to(tl.uint32)))

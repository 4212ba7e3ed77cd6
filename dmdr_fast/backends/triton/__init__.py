"""The Triton kernels of kernels/: the default for CUDA tensors.

Launch configurations are rules on the shape, not measurements: nothing is timed on a user's inputs, the first call runs
like any other, and all of it can be captured in a CUDA graph. Arithmetic is float32, sums have a fixed order.
"""

from dmdr_fast.backends.triton import activation, dmd, lora, modulation, preprocess, qk, renoise, rms_norm, sde  # noqa: F401
from dmdr_fast.backends.triton.launch import BACKEND

__all__ = ["BACKEND"]

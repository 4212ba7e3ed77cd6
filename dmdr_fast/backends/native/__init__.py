"""The kernels of csrc/ through their C ABI, for CPU and CUDA tensors."""

from dmdr_fast.backends.native import activation, dmd, lora, modulation, noise, preprocess, rope, sde  # noqa: F401
from dmdr_fast.backends.native.library import Library, NativeError, library_path

__all__ = ["Library", "NativeError", "library_path"]

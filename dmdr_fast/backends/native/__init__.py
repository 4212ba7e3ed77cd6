"""The kernels of csrc/ through their C ABI, for CPU and CUDA tensors."""

from dmdr_fast.backends.native import (  # noqa: F401
    activation,
    dmd,
    lora,
    modulation,
    noise,
    preprocess,
    rms_norm,
    rope,
    sde,
)
from dmdr_fast.backends.native.library import Library, NativeError, library_path

__all__ = ["Library", "NativeError", "library_path"]

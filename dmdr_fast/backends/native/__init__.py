"""The kernels of csrc/ through their C ABI, for CPU and CUDA tensors. Every module here registers what it has."""

import importlib
import pkgutil

from dmdr_fast.backends.native.library import Library, NativeError, library_path

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Library", "NativeError", "library_path"]

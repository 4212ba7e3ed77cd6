"""The Triton kernels of kernels/: the default for CUDA tensors. Every module here registers what it has.

Launch configurations are rules on the shape, not measurements: nothing is timed on a user's inputs, the first call runs
like any other, and all of it can be captured in a CUDA graph. Arithmetic is float32, sums have a fixed order.
"""

import importlib
import pkgutil

from dmdr_fast.backends.triton.launch import BACKEND

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["BACKEND"]

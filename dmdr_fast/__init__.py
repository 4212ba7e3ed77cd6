"""Few-step distillation of diffusion transformers by DMD and reinforcement learning (DMDR, arXiv 2511.13649).

Importing the package needs neither a GPU nor triton, deepspeed or diffusers: each is imported where it is used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmdr_fast.patch.apply import patch as patch  # which the module of that name is, called

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "patch":  # imported when asked for, as torch is
        import importlib

        return importlib.import_module("dmdr_fast.patch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

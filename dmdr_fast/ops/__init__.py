"""The fused ops: one checked, differentiable, compilable function each.

`dmdr_fast.backends` picks the kernel that runs.

>>> from dmdr_fast import ops
>>> x_t = ops.renoise(x0, 1 - t, t, seed=seed)
>>> print(ops.explain("renoise", x0, 1 - t, t, seed=seed))
"""

from __future__ import annotations

import inspect

import torch

from dmdr_fast.backends import Choice, FallbackError
from dmdr_fast.ops import _library, nn
from dmdr_fast.ops.activation import gelu_mul, silu_mul
from dmdr_fast.ops.dmd import DMDGradient, dmd_gradient, dmd_loss
from dmdr_fast.ops.gated_residual import gated_residual
from dmdr_fast.ops.gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from dmdr_fast.ops.gated_residual_rms_norm import gated_residual_rms_norm
from dmdr_fast.ops.grpo_loss import GRPOLoss, RatioStats, grpo_loss
from dmdr_fast.ops.layer_norm_modulate import layer_norm_modulate
from dmdr_fast.ops.lora import multi_lora
from dmdr_fast.ops.preprocess import preprocess_reward
from dmdr_fast.ops.qk_norm_rope import qk_norm_rope
from dmdr_fast.ops.renoise import normal_noise, renoise
from dmdr_fast.ops.rms_norm_scale import rms_norm_scale
from dmdr_fast.ops.sde_step import SDEStep, sde_step_logprob


def explain(name: str, *args, **kwargs) -> Choice:
    """Which backend would run ``ops.<name>(*args, **kwargs)`` and why; computes nothing.

    Args:
        name: a public op, e.g. ``"renoise"``; the other arguments are the call's own and are checked.

    Returns:
        ``Choice`` (function, backend, reason, refused) for the forward; ``str()`` of it is one line.

    Raises:
        ValueError: there is no such op. Otherwise as the op.
    """
    ops = {op for op in __all__ if inspect.isfunction(globals()[op])} - {"explain"}
    if name not in ops:
        raise ValueError(f"explain: name: expected one of {', '.join(sorted(ops))}, got {name!r}")
    with _library.Explaining() as explaining, torch.no_grad():
        globals()[name](*args, **kwargs)
    return explaining.choice or Choice(name, "reference", "it is plain PyTorch")


__all__ = [
    "Choice",
    "DMDGradient",
    "FallbackError",
    "GRPOLoss",
    "RatioStats",
    "SDEStep",
    "dmd_gradient",
    "dmd_loss",
    "explain",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gated_residual_rms_norm",
    "gelu_mul",
    "grpo_loss",
    "layer_norm_modulate",
    "multi_lora",
    "nn",
    "normal_noise",
    "preprocess_reward",
    "qk_norm_rope",
    "renoise",
    "rms_norm_scale",
    "sde_step_logprob",
    "silu_mul",
]

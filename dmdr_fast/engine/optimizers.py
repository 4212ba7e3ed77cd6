"""The optimizer of a trained role: torch's fused AdamW, or AdamW whose moments take 8 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dmdr_fast.config import AdamW
from dmdr_fast.errors import UserError


def numbers(settings: AdamW) -> dict[str, Any]:
    """The keyword arguments that every AdamW takes."""
    return {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}


def build_optimizer(parameters: Sequence[nn.Parameter], settings: AdamW, kind: str) -> torch.optim.Optimizer:
    """AdamW with the learning rate, moment decays, weight decay and eps of ``settings``.

    =================== =========================================== ==================================
    kind                moments, bytes per parameter                from
    =================== =========================================== ==================================
    adamw               8                                           torch, fused
    adamw_8bit          2, and a scale per 256 values               bitsandbytes, else torchao
    paged_adamw_8bit    the same, paged out to the host when needed bitsandbytes, CUDA only
    =================== =========================================== ==================================

    8-bit moments: Dettmers et al., arXiv 2110.02861. Tensors below 4096 elements keep fp32 moments in both packages.
    """
    given = numbers(settings)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **given)
    if kind == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, **given)
    import bitsandbytes.optim

    made = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return made[kind](parameters, **given)


def check_device(kind: str, device: torch.device) -> None:
    """Raise a UserError where ``optimizer.kind`` cannot run on ``device``."""
    if kind == "paged_adamw_8bit" and device.type != "cuda":
        raise UserError(
            f"optimizer.kind: paged_adamw_8bit pages CUDA memory, this run is on {device.type}; use adamw_8bit"
        )

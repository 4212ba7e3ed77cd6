"""Reading whole weights out of engines, and an EMA that lives on the shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dmdr_fast.engine.runtime import Runtime


def local_shard(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this rank stores: a flat padded slice under ZeRO-3, the whole otherwise."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data


def full_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) of each parameter, gathered one at a time. All ranks must iterate."""
    for name, parameter in module.named_parameters():
        sharded = hasattr(parameter, "ds_tensor")
        with deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext():
            yield name, parameter.detach().cpu().clone()


class EMA:
    """Exponential moving average of a network's trained parameters, fp32, on the shards: e <- d e + (1 - d) p."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shards = {n: local_shard(p).detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        current = [local_shard(p).float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shards.values()), current, 1.0 - self.decay)

    def full(self, runtime: Runtime) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 tensor on the CPU). All ranks must iterate."""
        for name, parameter in self.parameters.items():
            shard = self.shards[name]
            if hasattr(parameter, "ds_tensor"):
                whole = runtime.concatenate(shard)[: parameter.ds_numel].view(parameter.ds_shape)
            else:
                whole = shard
            yield name, whole.cpu().clone()


def save_weights(module: nn.Module, ema: EMA | None, path: Path, runtime: Runtime) -> None:
    """Write the network's fp32 state dict as safetensors, the EMA in the place of trained weights where there is one.

    Written aside and renamed. All ranks must call.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in full_parameters(module):
        if runtime.is_main:
            weights[name] = tensor.float()
    for name, tensor in ema.full(runtime) if ema is not None else ():
        if runtime.is_main:
            weights[name] = tensor
    if runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        save_file({n: t.contiguous() for n, t in sorted(weights.items())}, aside)
        aside.rename(path)
    runtime.barrier()

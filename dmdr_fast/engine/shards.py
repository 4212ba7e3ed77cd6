"""Reading whole weights out of engines, and an EMA that lives on the shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dmdr_fast.disk import whole
from dmdr_fast.engine.roles import AdapterRole, TrainedRole
from dmdr_fast.engine.runtime import Runtime
from dmdr_fast.models.eight_bit import dequantise
from dmdr_fast.models.families import Denoiser
from dmdr_fast.models.lora import LoraAdapter


def master_shard(parameter: nn.Parameter) -> Tensor | None:
    """The fp32 master weights of a trained parameter that this rank keeps; None where it keeps none of them.

    ZeRO-3: a flat, padded slice. ZeRO-2: the flat part of it in this rank's optimizer partition. Stage 0: all of it.
    """
    if hasattr(parameter, "ds_tensor"):
        return deepspeed.utils.safe_get_local_fp32_param(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return None if parameter._hp_mapping is None else parameter._hp_mapping.hp_fragment
    return getattr(parameter, "fp32_master", parameter).data


def full_parameters(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) of each parameter, gathered one at a time. All ranks must iterate."""
    for name, parameter in parameters.items():
        sharded = hasattr(parameter, "ds_tensor")
        with deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext():
            yield name, parameter.detach().cpu().clone()


class EMA:
    """Exponential moving average of trained parameters by name, e <- d e + (1 - d) p, on the fp32 master shards.

    Made after ``deepspeed.initialize``, which shards them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, dict(parameters)
        masters = {n: master_shard(p) for n, p in self.parameters.items()}
        self.shards = {n: m.detach().float().clone() for n, m in masters.items() if m is not None}

    @torch.no_grad()
    def update(self) -> None:
        masters = [master_shard(self.parameters[n]) for n in self.shards]
        current = [master.float() for master in masters if master is not None]
        torch._foreach_lerp_(list(self.shards.values()), current, 1.0 - self.decay)

    def full(self, runtime: Runtime) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 tensor on the CPU). All ranks must iterate."""
        parameter: Any  # with what DeepSpeed has hung on it
        for name, parameter in self.parameters.items():
            shard = self.shards.get(name)
            if hasattr(parameter, "ds_tensor"):
                whole = runtime.concatenate(self.shards[name].to(runtime.device))[: parameter.ds_numel].view(
                    parameter.ds_shape
                )
            elif hasattr(parameter, "_hp_mapping"):
                whole = torch.zeros(parameter.numel(), device=runtime.device)
                if shard is not None:
                    start = parameter._hp_mapping.lp_fragment_address.start
                    whole[start : start + shard.numel()] = shard.to(runtime.device)
                whole = runtime.sum(whole).view_as(parameter)
            else:
                whole = self.shards[name]
            yield name, whole.cpu().clone()


def save_generator(
    role: TrainedRole | AdapterRole,
    ema: EMA | None,
    path: Path,
    runtime: Runtime,
    *,
    merges_lora: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the generator as safetensors under the network's own names, the EMA in place of trained weights if any.

    A generator that is a LoRA becomes a plain network's state dict with ``merges_lora``, W + lora_scale (A B)^T in
    fp32, on an 8-bit base with the dequantised W; without, the file holds the adapter alone ("LAYER.lora_A",
    "LAYER.lora_B"), its scale in the metadata. Written aside and renamed. All ranks must call.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in full_parameters(_generator_parameters(role, merges_lora)):
        if runtime.is_main:
            weights[name] = tensor.dequantize().float()  # torchao's float8 is a tensor of its own kind
    for name, tensor in ema.full(runtime) if ema is not None else ():
        if runtime.is_main:
            weights[name] = tensor
    if runtime.is_main:
        metadata = None
        if role.adapter is not None and merges_lora:
            dequantise(weights)
            _merge(weights, role.adapter, role.lora_scale)
        elif role.adapter is not None:
            metadata = {"lora_scale": repr(role.lora_scale)}
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {name.removeprefix(Denoiser.prefix): weights[name].to(dtype).contiguous() for name in sorted(weights)}
        with whole(path) as aside:
            save_file(named, aside, metadata=metadata)
    runtime.barrier()


def _generator_parameters(role: TrainedRole | AdapterRole, merges_lora: bool) -> dict[str, nn.Parameter]:
    """What the generator's file is made of, the trained ones under ``role.trained``'s names."""
    if role.adapter is not None and not merges_lora:
        return role.trained
    adapters = {id(p) for a in getattr(role.module, "lora_adapters", {}).values() for p in a.parameters()}
    return {n: p for n, p in role.module.named_parameters() if id(p) not in adapters} | role.trained


def _merge(weights: dict[str, Tensor], adapter: LoraAdapter, scale: float) -> None:
    for layer in adapter.layers:
        a, b = (weights.pop(f"{layer}.{name}") for name in ("lora_A", "lora_B"))
        weights[f"{layer}.weight"] = torch.addmm(weights[f"{layer}.weight"], b.T, a.T, alpha=scale)

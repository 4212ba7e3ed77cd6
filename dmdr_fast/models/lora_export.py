"""An adapter out of the trainer: merged into the base, or by itself under diffusers' names."""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_fast.models.lora import LoraAdapter


def merge(adapter: LoraAdapter, scale: float = 1.0) -> dict[str, Tensor]:
    """The base's state dict with W + scale (A B)^T in the adapter's layers, summed in fp32, in W's dtype.

    No LoRA name is left: it loads into the plain model. Other tensors share memory with the adapter's model.

    Raises:
        ValueError: a post_projection adapter, or weights that ZeRO-3 has partitioned or that are int8.
    """
    _require_standard(adapter, "merged into the weights")
    if any(layer.weight.dtype == torch.int8 for layer in adapter.layers.values()):
        raise ValueError(f"LoRA {adapter.role!r}: its base is in int8 and cannot take it up; merge into the base's own")
    adapters = getattr(adapter.model, "lora_adapters", {})
    foreign = {id(parameter) for other in adapters.values() for parameter in other.parameters()}
    state = {
        name: tensor.detach()
        for name, tensor in adapter.model.state_dict(keep_vars=True).items()
        if id(tensor) not in foreign
    }
    for path, (a, b) in _factors(adapter).items():
        weight = state[f"{path}.weight"]
        if weight.shape != (b.shape[1], a.shape[0]):
            raise ValueError(
                f"LoRA {adapter.role!r}: {path}.weight expected {[b.shape[1], a.shape[0]]}, "
                f"got {list(weight.shape)}: gather the ZeRO-3 partitions first "
                "(deepspeed.zero.GatheredParameters)"
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        state[f"{path}.weight"] = torch.addmm(weight.to(wide), b.to(wide).T, a.to(wide).T, alpha=scale).to(weight.dtype)
    return state


def diffusers_lora(adapter: LoraAdapter, scale: float = 1.0) -> dict[str, Tensor]:
    """{"LAYER.lora_A.weight" [r, in], "LAYER.lora_B.weight" [out, r]}, as diffusers and PEFT name an adapter's tensors.

    ``scale`` is multiplied into B: readers apply a file without alphas at 1.

    Raises:
        ValueError: a post_projection adapter.
    """
    _require_standard(adapter, "written as a LoRA of diffusers")
    tensors = {}
    for path, (a, b) in _factors(adapter).items():
        tensors[f"{path}.lora_A.weight"] = a.T.contiguous()
        tensors[f"{path}.lora_B.weight"] = (scale * b).T.contiguous()
    return tensors


def _factors(adapter: LoraAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    state = adapter.state_dict()
    return {path: (state[f"{path}.lora_A"], state[f"{path}.lora_B"]) for path in adapter.layers}


def _require_standard(adapter: LoraAdapter, use: str) -> None:
    if adapter.form != "standard":
        raise ValueError(
            f"LoRA {adapter.role!r}: a {adapter.form} adapter cannot be {use}: on q = W x + b it adds "
            "(x W^T A) B + (b A) B, and the bias part is no low-rank change of W. "
            "Train with form='standard' to export"
        )

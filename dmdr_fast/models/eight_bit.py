"""A frozen network with 8-bit weights: half the bytes of bf16, a quarter of fp32, the same activations.

int8 is ours: symmetric, one scale per output channel, dequantised layer by layer where it is used. It is made of
ordinary tensors, so ZeRO-3 partitions it, LoRA adapters sit on it and gradients pass through it to them. float8 is
torchao's, with float8 matrix products: for GPUs that have them, and for networks that are replicated.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.models.lora import LoraLinear

EightBit = Literal["int8", "float8"]
FLOAT8_CAPABILITY = (8, 9)  # Ada and Hopper: the first with float8 matrix products


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [out, in], scale [out, 1] of weight's dtype) with weight ~ q * scale, q in -127..127.

    scale = max|w| / 127 of the channel, rounded up to bf16 before the division: casting it to bf16 later, as DeepSpeed
    does with every floating-point parameter, then changes nothing. A channel of zeros has scale 1.
    """
    wide = weight.detach().float()
    exact = wide.abs().amax(dim=1, keepdim=True) / 127
    rounded = exact.bfloat16()
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    scale = torch.where(rounded.float() < exact, up, rounded).float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (wide / scale).round().to(torch.int8), scale.to(weight.dtype)


def dequantise(weights: dict[str, Tensor]) -> None:
    """W = q * scale for the int8 weights of a state dict whose tensors are fp32, in place; their scales go."""
    for name in [name for name in weights if name.endswith(".weight_scale")]:
        weights[name.removesuffix("_scale")].mul_(weights.pop(name))


class Int8Product(torch.autograd.Function):
    """x W^T + b with W = q * scale. Keeps q for the backward pass and not W, which it makes again; W is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        return F.linear(x, q.to(scale.dtype) * scale, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, scale = ctx.saved_tensors
        return gradient @ (q.to(scale.dtype) * scale), None, None, None


class Int8Linear(LoraLinear):
    """A frozen ``nn.Linear`` whose ``weight`` is int8 [out, in] beside ``weight_scale`` [out, 1]; it may have adapters.

    x [..., in] of the scale's dtype -> [..., out], that dtype.
    """

    weight_scale: nn.Parameter

    def base(self, x: Tensor) -> Tensor:
        return Int8Product.apply(x, self.weight, self.weight_scale, self.bias)


def quantise_blocks(model: nn.Module, kind: EightBit) -> int:
    """Give the Linear layers in the blocks of ``model`` 8-bit weights, in place; returns how many.

    Blocks are what the model keeps in a ModuleList: embeddings and the last layer, a percent of the weights and the
    most sensitive, stay as they are. LoRA adapters go on as they were. Before ``deepspeed.initialize``.

    Raises:
        ValueError: nothing to quantise, a Linear with a forward of its own, or float8 where it cannot be.
    """
    layers = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and _in_a_list(model, name)
    ]
    if not layers:
        raise ValueError(f"{kind}: {type(model).__name__} keeps no Linear layers in blocks (ModuleLists)")
    if kind == "float8":
        _float8(model, layers)
        return len(layers)
    for layer in layers:
        if type(layer) not in (nn.Linear, LoraLinear):
            raise ValueError(
                f"{kind}: {type(layer).__name__} has a forward of its own: quantise before what replaced it"
            )
        q, scale = quantise(layer.weight)
        if not hasattr(layer, "adapters"):
            layer.__dict__["adapters"] = {}
        layer.__class__ = Int8Linear
        layer.weight = nn.Parameter(q, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
    return len(layers)


def float8_refusal(device: torch.device) -> str | None:
    """Why float8 cannot run on ``device``; None when it can."""
    if importlib.util.find_spec("torchao") is None:
        return "needs torchao, which is not installed"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        return f"needs a GPU with float8 products (Ada, Hopper or later), this is {device.type}"
    return None


def _float8(model: nn.Module, layers: list[nn.Linear]) -> None:
    refusal = float8_refusal(layers[0].weight.device)
    if refusal is not None:
        raise ValueError(f"float8 {refusal}: use int8")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    chosen = {id(layer) for layer in layers}
    quantize_(
        model.requires_grad_(False),
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        filter_fn=lambda module, name: id(module) in chosen,
    )


def _in_a_list(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(isinstance(model.get_submodule(".".join(parents[:i])), nn.ModuleList) for i in range(len(parents) + 1))

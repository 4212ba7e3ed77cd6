"""Small random models of every family, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmdr_fast.models.sit import SiT

IMAGE, TEXT, DIM = 9, 5, 32  # image tokens (3 x 3), text tokens, width of the models


@dataclass(frozen=True)
class Family:
    """``build(depth)`` makes the model; ``inputs`` are its float inputs, ``constants`` the others.

    Attributes:
        ops: how many places each op has at depth 1.
        linears: suffixes of layers for LoRA: projections on both sides of every fused op.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[], dict[str, Tensor | list[Tensor]]]
    constants: dict
    ops: dict[str, int]
    linears: list[str]


def randomised(model: nn.Module) -> nn.Module:
    """Weights that leave no branch, gate or norm without effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _sd3(depth: int) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=6,
        in_channels=4,
        out_channels=4,
        num_layers=depth + 1,  # the last one has no text feed-forward
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=DIM,
        pooled_projection_dim=12,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _flux(depth: int) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=depth,
        num_single_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )


def _flux2(depth: int) -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=depth,
        num_single_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def _z_image(depth: int) -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=DIM,
        n_layers=depth,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )


def _qwen_image(depth: int) -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        num_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def _sit(depth: int) -> nn.Module:
    return SiT(input_size=6, in_channels=4, hidden_size=DIM, depth=depth, num_heads=4, num_classes=10)


def _token_inputs() -> dict[str, Tensor]:
    return {"hidden_states": torch.randn(2, IMAGE, 4), "encoder_hidden_states": torch.randn(2, TEXT, 16)}


TIMES = torch.tensor([0.25, 0.5])  # times 1000 exact in bfloat16: its rounding would drown everything else
GRID = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0))

FAMILIES = {
    "sd3": Family(
        _sd3,
        lambda: {
            "hidden_states": torch.randn(2, 4, 6, 6),
            "encoder_hidden_states": torch.randn(2, TEXT, 16),
            "pooled_projections": torch.randn(2, 12),
        },
        {"timestep": 1000 * TIMES},
        {
            "layer_norm_modulate": 5,  # two per block, one at the end
            "gated_residual": 4,  # two feed-forwards and attn (before attn2) of block 0, one of block 1
            "gated_residual_layer_norm_modulate": 3,
            "qk_norm_rope": 3,
        },
        ["attn.to_q", "attn.to_out.0", "norm1.linear", "ff.net.0.proj"],
    ),
    "flux": Family(
        _flux,
        lambda: _token_inputs() | {"pooled_projections": torch.randn(2, 12)},
        {"timestep": TIMES, "img_ids": GRID, "txt_ids": torch.zeros(TEXT, 3)},
        {
            "layer_norm_modulate": 4,
            "gated_residual": 3,
            "gated_residual_layer_norm_modulate": 2,
            "qk_norm_rope": 2,
        },
        ["attn.to_q", "attn.to_out.0", "norm1.linear", "proj_out"],
    ),
    "flux2": Family(
        _flux2,
        _token_inputs,
        {
            "timestep": TIMES,
            "img_ids": nn.functional.pad(GRID, (0, 1)),
            "txt_ids": torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(float(TEXT))),
        },
        {
            "layer_norm_modulate": 4,
            "gated_residual": 3,
            "gated_residual_layer_norm_modulate": 2,
            "qk_norm_rope": 2,
            "silu_mul": 3,
        },
        ["attn.to_q", "attn.to_qkv_mlp_proj", "attn.to_out.0", "ff.linear_in"],
    ),
    "z_image": Family(
        _z_image,
        # 16 image tokens, padded to 32; texts of two lengths, one past 32: attention masks on the way
        lambda: {
            "x": [torch.randn(4, 1, 8, 8) for _ in range(2)],
            "cap_feats": [torch.randn(5, 16), torch.randn(35, 16)],
        },
        {"t": TIMES},
        {
            "layer_norm_modulate": 1,
            "rms_norm_scale": 4,
            "gated_residual_rms_norm": 4,
            "qk_norm_rope": 3,
            "silu_mul": 3,
        },
        ["attention.to_q", "attention.to_out.0", "feed_forward.w1", "layers.0.adaLN_modulation.0"],
    ),
    "qwen_image": Family(
        _qwen_image,
        _token_inputs,
        {
            "timestep": TIMES,
            "img_shapes": [[(1, 3, 3)]] * 2,
            "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
        {
            "layer_norm_modulate": 3,
            "gated_residual": 2,
            "gated_residual_layer_norm_modulate": 2,
            "qk_norm_rope": 1,
        },
        ["attn.to_q", "attn.to_out.0", "img_mod.1", "img_mlp.net.0.proj"],
    ),
    "sit": Family(
        _sit,
        lambda: {"x": torch.randn(2, 4, 6, 6)},
        {"t": TIMES, "y": torch.tensor([1, 10])},
        {"layer_norm_modulate": 2, "gated_residual": 1, "gated_residual_layer_norm_modulate": 1},
        ["attn.qkv", "attn.proj", "adaLN_modulation.1", "mlp.fc1"],
    ),
}


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    """Fresh leaves of ``dtype``."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    return {k: [leaf(t) for t in v] if isinstance(v, list) else leaf(v) for k, v in inputs.items()}


def run(model: nn.Module, family: Family, inputs: dict) -> Tensor:
    result = model(**inputs, **family.constants)
    sample = result if isinstance(result, Tensor) else result.sample
    return torch.stack(sample) if isinstance(sample, list) else sample


def leaves(inputs: dict) -> list[Tensor]:
    return [tensor for value in inputs.values() for tensor in (value if isinstance(value, list) else [value])]


def backward(model: nn.Module, family: Family, inputs: dict, grad: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of every input and of every trained parameter, by name."""
    model.zero_grad(set_to_none=True)
    for leaf in leaves(inputs):
        leaf.grad = None
    output = run(model, family, inputs)
    output.backward(grad.to(output.dtype))
    found = {"output": output.detach()}
    found |= {f"input {index}": leaf.grad for index, leaf in enumerate(leaves(inputs))}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of the forward of every fused op inside the block."""
    calls: dict[str, int] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "dmdr_fast":
                name = function._opname
                calls[name] = calls.get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    with Counting():
        yield calls

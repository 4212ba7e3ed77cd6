"""The layers of SiT, under the names of the published checkpoints; each draws on its own parameters only."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_fast.models.attention import AttentionKernel, attend

TIME_FREQUENCIES = 128  # cos and sin of each: the 256-wide embedding that the time MLP reads


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Fixed positions of a ``grid`` x ``grid`` square, row by row: fp32 [1, grid * grid, hidden_size].

    With D = hidden_size and w_i = 10000 ** (-i / (D/4)): [sin(col w) | cos(col w) | sin(row w) | cos(row w)],
    the column first, as MAE and every published SiT have it. Computed in fp64.
    """
    quarter = hidden_size // 4
    # From integers: deepspeed.zero.Init casts floating-point factory calls to the model's dtype.
    frequency = 10000.0 ** (-torch.arange(quarter).double() / quarter)
    angle = torch.arange(grid).double()[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, D/2]
    rows = wave[:, None].expand(grid, grid, -1)
    columns = wave[None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, hidden_size).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x [B, T, D], shift and scale [B, 1, D]."""
    return x * (1 + scale) + shift


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, T, D]: one linear map per patch, patches row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """MLP of [cos(t w) | sin(t w)], w_i = 10000 ** (-i / 128), t in [0, 1] as it is (not times 1000)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        width = 2 * TIME_FREQUENCIES
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        weight_dtype = cast(nn.Linear, self.mlp[0]).weight.dtype
        # bf16 has 8 bits: t = 0.999 would be 1. So the waves are fp32 (fp64 in an fp64 model).
        dtype = torch.promote_types(weight_dtype, torch.float32)
        index = torch.arange(TIME_FREQUENCIES, device=t.device, dtype=dtype)
        frequency = torch.exp(-math.log(10000) * index / TIME_FREQUENCIES)
        angle = t.to(dtype)[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(weight_dtype))


class LabelEmbedder(nn.Module):
    """A row per class and a last one for the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        try:
            return self.embedding_table(y)
        except IndexError:  # CPU only: there the lookup checks for us, at no cost where labels are right
            null = self.embedding_table.num_embeddings - 1
            raise ValueError(
                f"SiT: y must hold classes 0..{null - 1} or the null class {null}, "
                f"got {int(y.min())}..{int(y.max())}: check the labels, or set model.num_classes"
            ) from None


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection (bias, no QK-norm).

    ``attention_kernel`` is switched by ``dmdr_fast.models.attention``.
    """

    attention_kernel: AttentionKernel = "sdpa"

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.unbind(2)
        out = attend(q, k, v, self.attention_kernel)
        return self.proj(out.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _adaptive_modulation(hidden_size: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


class SiTBlock(nn.Module):
    """x + gate1 attn(mod(LN(x))), then x + gate2 mlp(mod(LN(x))); shifts, scales and gates from c [B, D]."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = _adaptive_modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then a token to its patch: [B, T, p * p * channels], channel fastest."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = _adaptive_modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def initialise(name: str, module: nn.Module) -> None:
    """The published start of the module called ``name`` in a SiT.

    Xavier for maps, N(0, 0.02^2) for embeddings, and zeros where a block must begin as the identity.
    """
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
        elif name.startswith("t_embedder."):
            nn.init.normal_(module.weight, std=0.02)
        else:
            with torch.no_grad():
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch is one linear map too
        if module.bias is not None:
            nn.init.zeros_(module.bias)

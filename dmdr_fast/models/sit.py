"""SiT: a diffusion transformer on latents with class labels, under the published parameter names.

Architecture of SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940): patches, fixed sin-cos positions, and
blocks whose LayerNorms (no affine, eps 1e-6) are modulated by the time and class embedding (adaLN-Zero).
Checkpoints of both are read by ``load_sit_weights``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmdr_fast.models.partitioned import whole_parameters
from dmdr_fast.models.sit_layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    SiTBlock,
    TimestepEmbedder,
    initialise,
    sincos_positions,
)
from dmdr_fast.models.sit_weights import load_sit_weights

__all__ = ["SIT_CONFIGS", "SiT", "load_sit_weights"]

SIT_CONFIGS: dict[str, dict[str, int]] = {
    "SiT-S/2": {"depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 2},
    "SiT-B/2": {"depth": 12, "hidden_size": 768, "num_heads": 12, "patch_size": 2},
    "SiT-L/2": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "patch_size": 2},
    "SiT-XL/2": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 2},
}


class SiT(nn.Module):
    """A class-conditional velocity network: v = eps - x0 at x = (1 - t) x0 + t eps, t = 1 pure noise.

    Args:
        input_size: height and width of the latent (or image), divisible by ``patch_size``.
        num_classes: classes without the null class; the label table has one row more.
        learn_sigma: the checkpoint has 2 x ``in_channels`` outputs (the published SiT ones); the second half
            is dropped.
        time_reversed: the checkpoint's own time runs from noise at 0 to data at 1 and it predicts x0 - eps
            (the published SiT ones; REPA's do not): it is evaluated at 1 - t and negated, so callers see one
            convention.

    The weights may be of any floating-point dtype; the output has ``x``'s. It may be built under
    ``deepspeed.zero.Init``. Activation checkpointing is switched as in diffusers' models: see
    ``dmdr_fast.models.recompute``.
    """

    prediction = "flow"
    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Callable[..., Tensor] | None

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        time_reversed: bool = False,
    ):
        super().__init__()
        _check_sizes(input_size, patch_size, hidden_size, num_heads, num_classes)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.learn_sigma, self.time_reversed = num_classes, learn_sigma, time_reversed
        self.disable_gradient_checkpointing()
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        for name, module in self.named_modules():
            with whole_parameters(module.parameters(recurse=False), write=True):
                initialise(name, module)

    def null_condition(self, y: Tensor) -> Tensor:
        """The null class for every sample of ``y`` [B]."""
        return torch.full_like(y, self.num_classes)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """v = eps - x0 in ``x``'s shape and dtype, for x [B, C, H, W], t [B] in [0, 1] and y int64 [B].

        Raises:
            ValueError: shapes that do not fit; on CPU, labels out of range too.
        """
        self._check_inputs(x, t, y)
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        c = self.t_embedder(1 - t if self.time_reversed else t) + self.y_embedder(y)
        recompute = self._gradient_checkpointing_func if torch.is_grad_enabled() else None
        for block in self.blocks:
            tokens = block(tokens, c) if recompute is None else recompute(block, tokens, c)
        v = self._unpatchify(self.final_layer(tokens, c)).to(x.dtype)
        return -v if self.time_reversed else v

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Tensor]) -> None:
        """Run each block of a graded forward as ``gradient_checkpointing_func(block, tokens, c)``."""
        self._gradient_checkpointing_func = gradient_checkpointing_func

    def disable_gradient_checkpointing(self) -> None:
        """Run the blocks as they are."""
        self._gradient_checkpointing_func = None

    def _unpatchify(self, patches: Tensor) -> Tensor:
        grid, p = self.input_size // self.patch_size, self.patch_size
        image = patches.reshape(patches.shape[0], grid, grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        # [B, channels, row, p, column, p]; with learn_sigma the first half of the channels is the velocity
        return image[:, : self.in_channels].reshape(-1, self.in_channels, self.input_size, self.input_size)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(
                f"SiT: x must be [B, {', '.join(map(str, expected))}], got {list(x.shape)}: "
                "change the data, or model.resolution and model.channels"
            )
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"SiT: {name} must be [{x.shape[0]}], one per sample, got {list(value.shape)}")
        if y.is_floating_point():
            raise ValueError(f"SiT: y must hold integer classes (int64), got {y.dtype}")


def _check_sizes(input_size: int, patch_size: int, hidden_size: int, num_heads: int, num_classes: int) -> None:
    if patch_size < 1 or input_size < patch_size or input_size % patch_size:
        raise ValueError(
            "SiT: input_size (model.resolution over the decoder's factor) must be a multiple of "
            f"model.patch_size {patch_size}, got {input_size}"
        )
    if hidden_size % num_heads:
        raise ValueError(f"SiT: model.hidden_size must be a multiple of model.num_heads {num_heads}, got {hidden_size}")
    if hidden_size % 4:
        raise ValueError(f"SiT: model.hidden_size must be a multiple of 4 (sin, cos of row, column), got {hidden_size}")
    if num_classes < 1:
        raise ValueError(f"SiT: model.num_classes must be at least 1, got {num_classes}")

"""The calls whose kernels are compiled for sm_90: every raw function at a size that it is used at, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmdr_fast.backends.triton import BACKEND, preprocess
from tests.raw import RawFunctions

_FLOAT = torch.float32
kernels = RawFunctions(BACKEND)

# Instructions per element that a kernel may take: an H100 has 9.5 for each byte at 3 TB/s, an H200 6.6 at 4.3 TB/s.
MOST_INSTRUCTIONS = {
    "seeded_renoise_kernel": 38,
    "renoise_kernel": 57,
    "scaled_kernel": 38,
    "normal_noise_kernel": 34,
    "layer_norm_modulate_kernel": 26,
    "layer_norm_modulate_bwd_kernel": 48,
    "gated_residual_layer_norm_modulate_kernel": 32,
    "gated_residual_layer_norm_modulate_bwd_kernel": 70,
    "rms_norm_scale_kernel": 20,
    "rms_norm_scale_bwd_kernel": 45,
    "gated_residual_rms_norm_kernel": 24,
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    """Name to (call, elements that one block of each kernel handles at a time).

    A kernel that is left out of the latter is a second stage: sums, scalars, tables.
    """
    return {**_latent_cases(), **_norm_cases(), **_token_cases(), **_image_cases()}


def _latent_cases() -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    # SD3.5 latents at 1024 pixels; SiT's at 256; the largest sample that one block holds.
    x, small, block = meta(8, 16, 128, 128), meta(8, 4, 32, 32), meta(8, 16, 32, 32)
    scalar, seed, number = meta(8, dtype=_FLOAT), meta(2, dtype=torch.int64), meta(dtype=_FLOAT)

    def dmd(latent: Tensor, nan_policy: str) -> Callable[[], object]:
        return lambda: kernels.dmd_gradient_fwd(
            latent, latent, latent, latent, latent, scalar, None, None, None, None, 3.5, "standard", "flow",
            "per_sample", 1e-8, "add", nan_policy, torch.bfloat16, "mean", 0.5, False,
        )  # fmt: skip

    return {
        "renoise_fwd, drawn noise": (
            lambda: kernels.renoise_fwd(x, scalar, scalar, None, seed, 0),
            {"seeded_renoise_kernel": 3896},
        ),
        "renoise_fwd, given noise": (
            lambda: kernels.renoise_fwd(x, scalar, scalar, x, None, 0),
            {"renoise_kernel": 2048},
        ),
        "renoise_bwd": (lambda: kernels.renoise_bwd(x, scalar, torch.bfloat16), {"scaled_kernel": 2048}),
        "renoise_scale_bwd": (lambda: kernels.renoise_scale_bwd(x, x), {"product_sums_kernel": 4096}),
        "normal_noise_fwd": (
            lambda: kernels.normal_noise_fwd(list(x.shape), seed, 0, torch.bfloat16),
            {"normal_noise_kernel": 4096},
        ),
        "dmd_gradient_fwd, 4096 elements": (dmd(small, "zero"), {"dmd_gradient_sample_kernel": 4096}),
        "dmd_gradient_fwd, 16384 elements": (dmd(block, "zero"), {"dmd_gradient_sample_kernel": 16384}),
        "dmd_gradient_fwd, 262144 elements": (
            dmd(x, "zero_sample"),
            {"dmd_distance_kernel": 2048, "dmd_gradient_kernel": 2048},
        ),
        "dmd_loss_bwd": (
            lambda: kernels.dmd_loss_bwd(number, x, number, torch.bfloat16),
            {"dmd_loss_bwd_kernel": 2048},
        ),
        "sde_step_fwd": (
            lambda: kernels.sde_step_fwd(x, x, scalar, scalar, None, seed, 0, "flow_grpo", 0.7),
            {"sde_draw_kernel": 4096, "sde_square_kernel": 2048},
        ),
        "sde_step_bwd": (
            lambda: kernels.sde_step_bwd(x, scalar, None, x, x, scalar, scalar, x, "flow_grpo", 0.7, False, True),
            {"sde_step_bwd_kernel": 2048},
        ),
    }


def _norm_cases() -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    """Rows of SiT-XL, SD3, SD3.5, FLUX and Z-Image: each width fills its two pieces otherwise."""
    result = {}
    for width in (1152, 1536, 2432, 3072, 3840):
        result |= _norms_of(width, f"{width} features", shared=True)
    return result | _norms_of(1536, "modulation per token", shared=False)


def _norms_of(width: int, label: str, shared: bool) -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    batch, tokens = 4, 4096
    x, row = meta(batch, tokens, width), meta(batch, tokens, dtype=_FLOAT)
    rows, weight = meta(batch, 1, width) if shared else x, meta(width)
    return {
        f"layer_norm_modulate_fwd, {label}": (
            lambda: kernels.layer_norm_modulate_fwd(x, rows, rows, 1e-6, torch.bfloat16),
            {"layer_norm_modulate_kernel": width},
        ),
        f"layer_norm_modulate_bwd, {label}": (
            lambda: kernels.layer_norm_modulate_bwd(x, x, rows, row, row, 1e-6, torch.bfloat16, True, True),
            {"layer_norm_modulate_bwd_kernel": width},
        ),
        f"gated_residual_layer_norm_modulate_fwd, {label}": (
            lambda: kernels.gated_residual_layer_norm_modulate_fwd(x, x, rows, rows, rows, 1e-6, torch.bfloat16),
            {"gated_residual_layer_norm_modulate_kernel": width},
        ),
        f"gated_residual_layer_norm_modulate_bwd, {label}": (
            lambda: kernels.gated_residual_layer_norm_modulate_bwd(
                x, x, x, x, rows, rows, row, row, 1e-6, torch.bfloat16, True, True, True
            ),
            {"gated_residual_layer_norm_modulate_bwd_kernel": width},
        ),
        f"rms_norm_scale_fwd, {label}": (
            lambda: kernels.rms_norm_scale_fwd(x, weight, rows, 1e-5, torch.bfloat16),
            {"rms_norm_scale_kernel": width},
        ),
        f"rms_norm_scale_bwd, {label}": (
            lambda: kernels.rms_norm_scale_bwd(x, x, weight, rows, row, 1e-5, True, True, True),
            {"rms_norm_scale_bwd_kernel": width},
        ),
        f"gated_residual_rms_norm_fwd, {label}": (
            lambda: kernels.gated_residual_rms_norm_fwd(x, x, rows, weight, 1e-5),
            {"gated_residual_rms_norm_kernel": width},
        ),
    }


def _token_cases() -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    batch, tokens, width, rank = 4, 4096, 1536, 64
    x, one = meta(batch, tokens, width), meta(batch, 1, width)
    q, weight, table = meta(batch, tokens, 24, 128), meta(128), meta(1, tokens, 128, dtype=_FLOAT)
    rstd = meta(batch, tokens, 24, dtype=_FLOAT)
    packed, half = meta(batch, tokens, 8192), meta(batch, tokens, 4096)
    A, B, scale = meta(width, rank), meta(rank, width), meta(batch, dtype=_FLOAT)
    low_rank = meta(batch, tokens, rank, dtype=_FLOAT)
    result = {
        "gated_residual_fwd": (lambda: kernels.gated_residual_fwd(x, x, one), {"gated_residual_kernel": 4096}),
        "gated_residual_bwd": (
            lambda: kernels.gated_residual_bwd(x, x, one, True, True),
            {"gated_residual_bwd_kernel": 4096},
        ),
        "multi_lora_fwd": (
            lambda: kernels.multi_lora_fwd(x, x, A, B, scale),
            {"project_kernel": 64 * 64, "expand_kernel": 64 * 64},
        ),
        "multi_lora_bwd": (
            lambda: kernels.multi_lora_bwd(x, x, low_rank, A, B, scale, True, True, True),
            {"project_kernel": 64 * 64, "expand_kernel": 64 * 64, "outer_sums_kernel": 64 * 64},
        ),
        "multi_lora_fwd, float32 adapter": (
            lambda: kernels.multi_lora_fwd(x, x, A.float(), B.float(), scale),
            {"project_kernel": 64 * 64, "expand_kernel": 64 * 64},
        ),
    }
    for interleaved, pairs in ((True, "neighbours"), (False, "halves")):
        result[f"qk_norm_rope_fwd, {pairs}"] = (
            lambda i=interleaved: kernels.qk_norm_rope_fwd(q, q, weight, weight, table, table, 1e-6, i),
            {"qk_norm_rope_kernel": 2 * 1024},  # queries and keys are both in the code
        )
        result[f"qk_norm_rope_bwd, {pairs}"] = (
            lambda i=interleaved: kernels.qk_norm_rope_bwd(
                q, q, q, q, weight, weight, table, table, rstd, rstd, 1e-6, i, True
            ),
            {"qk_norm_rope_bwd_kernel": 2 * 1024},
        )
    for activation in ("gelu", "gelu_tanh", "silu"):
        result[f"gated_activation_fwd, {activation}"] = (
            lambda a=activation: kernels.gated_activation_fwd(packed, a, False),
            {"gated_activation_kernel": 2048},
        )
        result[f"gated_activation_bwd, {activation}"] = (
            lambda a=activation: kernels.gated_activation_bwd(half, packed, a, False),
            {"gated_activation_bwd_kernel": 2048},
        )
    return result


def _image_cases() -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    image, small, inside = meta(8, 3, 1024, 1024), meta(8, 3, 224, 224), meta(8, 3, 1024, 128, dtype=torch.uint8)
    mean, std = [0.5] * 3, [0.25] * 3

    def first_use() -> None:
        preprocess._tables.clear()
        kernels.preprocess_reward_fwd(image, 224, 224, mean, std, True, -1.0, 1.0, True)

    return {
        "preprocess_reward_fwd": (
            first_use,
            {"resize_rows_kernel": 4 * 1024, "resize_columns_kernel": 8 * 128},
        ),
        "preprocess_reward_bwd": (
            lambda: kernels.preprocess_reward_bwd(small, inside, 1024, std, True, -1.0, 1.0, torch.bfloat16),
            {"resize_rows_bwd_kernel": 8 * 1024, "resize_columns_bwd_kernel": 8 * 128},
        ),
    }

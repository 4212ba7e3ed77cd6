"""One valid call of every public op, as keyword arguments that a test may change one at a time."""

from __future__ import annotations

from typing import Any

import torch

BATCH = 3
LATENT = (BATCH, 4, 5)
SEED = torch.tensor([1, 2])
# The arguments with a derivative.
WRT = {
    "renoise": "x0 alpha sigma noise",
    "dmd_loss": "x0",
    "preprocess_reward": "image",
    "sde_step_logprob": "x v",
    "grpo_loss": "logprob",
    "layer_norm_modulate": "x shift scale",
    "gated_residual": "x h gate",
    "gated_residual_layer_norm_modulate": "x h gate shift scale",
    "rms_norm_scale": "x weight scale",
    "gated_residual_rms_norm": "x h gate weight",
    "qk_norm_rope": "q k q_weight k_weight",
    "gelu_mul": "packed",
    "silu_mul": "packed",
    "multi_lora": "x base_out A B",
}


def latent(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or LATENT).to(dtype)


def valid_calls(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
    """Op name to the keyword arguments of a valid call; latents have ``dtype``."""

    def draw(*shape: int) -> torch.Tensor:
        return latent(*shape, dtype=dtype)

    sigma = torch.tensor([0.25, 0.5, 0.75])
    dmd = {
        **{name: draw() for name in ("x0", "x_t", "pred_fake", "pred_real", "pred_real_uncond")},
        "sigma": sigma,
        "cfg_scale": 2.0,
    }
    step = {
        "x": draw(),
        "v": draw(),
        "sigma": sigma,
        "sigma_next": sigma - 0.125,
        "kind": "dance",
        "eta": 0.3,
    }
    modulated = {"x": draw(BATCH, 4, 8), "shift": draw(BATCH, 8), "scale": draw(BATCH, 8)}
    gated = {"x": draw(BATCH, 4, 8), "h": draw(BATCH, 4, 8), "gate": draw(BATCH, 8)}
    return {
        "normal_noise": {"shape_like": draw(), "seed": SEED},
        "renoise": {"x0": draw(), "alpha": 1 - sigma, "sigma": sigma, "noise": draw()},
        "dmd_gradient": dmd,
        "dmd_loss": dmd,
        "preprocess_reward": {"image": draw(BATCH, 2, 9, 7), "size": 5, "mean": [0.5] * 2, "std": [0.25] * 2},
        "sde_step_logprob": {**step, "next_sample": draw()},
        "grpo_loss": {
            "logprob": latent(BATCH),
            "old_logprob": latent(BATCH),
            "advantage": latent(BATCH),
            "clip_low": 0.1,
            "clip_high": 0.1,
        },
        "layer_norm_modulate": modulated,
        "gated_residual": gated,
        "gated_residual_layer_norm_modulate": {**gated, "shift": draw(BATCH, 8), "scale": draw(BATCH, 8)},
        "rms_norm_scale": {"x": draw(BATCH, 4, 8), "weight": draw(8), "scale": draw(BATCH, 8)},
        "gated_residual_rms_norm": {**gated, "weight": draw(8)},
        "qk_norm_rope": {
            "q": draw(BATCH, 5, 2, 8),
            "k": draw(BATCH, 5, 1, 8),
            "q_weight": draw(8),
            "k_weight": draw(8),
            "cos": draw(5, 8),
            "sin": draw(5, 8),
        },
        "gelu_mul": {"packed": draw(2, 8)},
        "silu_mul": {"packed": draw(2, 8)},
        "multi_lora": {
            "x": draw(BATCH, 4, 6),
            "base_out": draw(BATCH, 4, 7),
            "A": draw(6, 2),
            "B": draw(2, 7),
            "scale": torch.tensor([1.0, 0.5, 0.0]),
        },
    }

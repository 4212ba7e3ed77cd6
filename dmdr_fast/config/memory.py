"""Memory options: what is kept, where, and in how many bits."""

from __future__ import annotations

from typing import Literal

from dmdr_fast.config.base import Section, key


class Memory(Section):
    """Options that trade time for memory; none of them changes what is computed, unless it says so."""

    activation: Literal["none", "selective", "full", "offload"] = key(
        "none",
        "Activations of graded forwards. none: all are kept; selective: attention and matrix products are kept, norms "
        "and activations recomputed; full: each block is recomputed; offload: full, block inputs in host memory.",
    )
    attention: Literal["auto", "sdpa", "cudnn", "flash_attn", "flash_attn_3"] = key(
        "auto",
        "Attention kernel: torch's sdpa in its own order, or with cuDNN's kernel first, or FlashAttention; auto takes "
        "cudnn on Hopper and later, then FlashAttention where it is installed, and says which and why.",
    )
    frozen: Literal["native", "int8", "float8"] = key(
        "native",
        "Weights of the frozen score base (the teacher, with shared_score the fake score's base too); int8: ours, a "
        "scale per channel; float8: torchao's, on GPUs that multiply in it. The effect on the DMD gradient is printed.",
    )


class Rollout(Section):
    """How the generator's rollouts run."""

    stop_step_per: Literal["micro_step", "rank"] = key(
        "micro_step",
        "Who draws the step that a rollout stops at. micro_step: each micro-step of an update, for all ranks; rank: "
        "each rank in each of them, for less variance: all wait for the longest (deepspeed.stage 0 and 2).",
    )
    keep_gathered: bool = key(
        False, "ZeRO-3: gather the generator's weights once per rollout, not once per step; needs room for all of them."
    )

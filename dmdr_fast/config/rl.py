"""Reinforcement learning: the rewards, how they reach the generator, and what watches for collapse."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from dmdr_fast.config.base import Count, Fraction, NonNegative, Number, Place, Positive, PositiveFloat, Section, key


class RewardTerm(Section):
    """One reward: a kind that the registry knows, or a user's own by import path."""

    kind: Place = key(
        "digits", "A registered reward, or a class of your own: package.module:Name or path/file.py:Name."
    )
    path: Place | None = key(None, "Folder or hub id of its weights, where it has any.")
    name: str | None = key(None, "Its name in the logs; null: the kind's own.")
    weight: Number = key(1.0, "Its weight in the sum of the rewards.")
    normalize: Literal["none", "running"] = key("none", "running: divided by its own running standard deviation.")
    options: dict[str, Any] = key({}, "Further keyword arguments of its constructor.")


class Reward(Section):
    """What the generator maximises after the cold start, and what is only watched."""

    terms: tuple[RewardTerm, ...] = key((), "Rewards that are optimised, summed with their weights.")
    held_out: tuple[RewardTerm, ...] = key((), "Rewards that are reported beside them and never optimised.")
    weight: NonNegative | Literal["auto"] = key(
        0.05,
        "Weight of the RL gradient beside the DMD gradient; 0: no RL; auto: the mean DMD loss at the end of the cold "
        "start over the size of the RL loss as RL starts (ReFL).",
    )
    warmup_steps: Count = key(0, "Updates over which the weight rises linearly from 0 once RL has started.")
    final_weight: NonNegative | None = key(None, "The weight at the last update, reached linearly; null: constant.")
    timeout: PositiveFloat = key(300.0, "Seconds that a score-only reward may take for one batch.")

    @model_validator(mode="before")
    @classmethod
    def _one_term_is_a_list_of_one(cls, values: Any) -> Any:
        """``terms: {kind: digits}`` means ``terms: [{kind: digits}]``."""
        if isinstance(values, dict):
            return {k: [v] if k in ("terms", "held_out") and isinstance(v, dict) else v for k, v in values.items()}
        return values


class ReFL(Section):
    """ReFL: the reward's own gradient on x0."""

    chunk: Positive = key(64, "Samples decoded and scored at a time; less is less memory.")
    checkpoint: bool = key(False, "Recompute the decoder's activations in its backward pass.")
    objective: Literal["linear", "hinge"] = key("linear", "linear: mean R; hinge: -mean max(0, margin - R).")
    margin: Number = key(0.0, "The reward above which the hinge leaves a sample alone.")


class GRPO(Section):
    """GRPO: policy gradient over groups of samples of one condition."""

    mode: Literal["policy", "advantage_weighted_dmd"] = key(
        "policy", "policy: clipped ratios; advantage_weighted_dmd: advantages weight the guidance in the DMD gradient."
    )
    group_size: Positive = key(8, "K, samples per prompt or class; divides the global micro-batch.")
    sde: Literal["flow_grpo", "dance", "cps"] = key("flow_grpo", "Form of the stochastic step.")
    eta: PositiveFloat = key(0.7, "Its noise: 0.7 for flow_grpo, 0.3 for dance.")
    std: Literal["group", "global", "none"] = key("group", "What advantages are divided by.")
    unbiased: bool = key(False, "Standard deviation over n - 1 (DanceGRPO) instead of n (Flow-GRPO).")
    eps: NonNegative = key(1e-4, "Added to the standard deviation.")
    drop_zero_variance: bool = key(True, "Leave out groups whose rewards are all alike.")
    clip_low: NonNegative = key(1e-4, "Ratio bound below, 1 - clip_low.")
    clip_high: NonNegative = key(1e-4, "Ratio bound above, 1 + clip_high.")
    adv_clip: PositiveFloat = key(5.0, "Largest |advantage|.")
    inner_epochs: Positive = key(1, "Generator steps per batch of rollouts.")
    trained_steps: Positive | None = key(None, "Stochastic steps trained per update, drawn anew; null: all.")
    noisy_last_step: bool = key(False, "The step that ends at t = 0 is stochastic too; needed for student.steps 1.")


class DPO(Section):
    """DPO: best against worst of a group, online."""

    beta: PositiveFloat = key(100.0, "Strength of the preference.")
    group_size: Positive = key(4, "Samples per prompt or class; divides the global micro-batch.")
    times: Literal["grid", "renoise"] = key("grid", "Times of the pairs: the student's own grid, or the renoise law.")


class RL(Section):
    """How rewards reach the generator, and what holds it near the teacher."""

    method: Literal["refl", "grpo", "dpo", "none"] = key("refl", "refl needs differentiable rewards; grpo, dpo do not.")
    regularizer: Literal["dmd", "kl", "none"] = key("dmd", "Beside RL: the DMD gradient, a KL to a reference, nothing.")
    kl_weight: NonNegative = key(0.0, "Weight of the KL to the reference; with regularizer dmd it comes on top.")
    reference: Literal["auto", "lora_off", "frozen"] = key(
        "auto", "lora_off: the generator without its LoRA; frozen: a copy of it as RL starts; auto: whichever fits."
    )
    refl: ReFL = key(ReFL(), "ReFL.")
    grpo: GRPO = key(GRPO(), "GRPO.")
    dpo: DPO = key(DPO(), "DPO.")


class Monitors(Section):
    """Thresholds of the collapse monitors; null: not watched."""

    min_diversity: NonNegative | None = key(None, "Least per-class diversity: mean pairwise RMS distance of x0.")
    max_grad_ratio: PositiveFloat | None = key(None, "Largest ratio of the RL gradient's norm to the DMD gradient's.")
    max_fake_loss: PositiveFloat | None = key(None, "Largest loss of the fake score.")
    max_saturation: Fraction | None = key(None, "Largest share of x0 outside [-1, 1] (pixels) or 4 sigma (latents).")
    max_clip_fraction: Fraction | None = key(None, "Largest share of clipped ratios (GRPO).")
    max_score_rounding: PositiveFloat | None = key(
        None, "Largest rounding error of the DMD gradient on a probe, |g - g_fp32| / |g_fp32|, at each log interval."
    )
    patience: Positive = key(3, "Log intervals in a row beyond a threshold before it counts as collapse.")

"""How a run goes: lengths, optimizers, engines, checkpoints, logs, evaluation."""

from __future__ import annotations

from typing import Literal

from dmdr_fast.config.base import Count, File, Fraction, NonNegative, Place, Positive, PositiveFloat, Section, key

LEAST_IMAGES = 4  # of an evaluation against real ones: precision and recall take three nearest neighbours of each


class Train(Section):
    """Lengths and batch."""

    cold_start_steps: Count = key(300, "Generator updates before reinforcement learning starts.")
    generator_steps: Positive = key(600, "Generator updates in all.")
    fake_updates: Positive = key(5, "R, fake-score updates per generator update.")
    rollout_reuse: Positive = key(
        1, "Fake updates in a row that share one rollout, renoised anew for each: cheaper, and another training run."
    )
    micro_batch_size: Positive = key(64, "Samples per rank and micro-step.")
    gradient_accumulation: Positive = key(1, "Micro-steps per update.")
    max_skipped: Positive = key(10, "Skipped updates (non-finite gradients) in a row that end the run.")
    stop_on_collapse: bool = key(False, "End the run, with a checkpoint, when a monitor says that it collapses.")

    @property
    def batch(self) -> int:
        """Samples per rank and update."""
        return self.micro_batch_size * self.gradient_accumulation


class AdamW(Section):
    """AdamW of one role."""

    lr: PositiveFloat = key(2e-5, "Learning rate in the cold start.")
    rl_lr: PositiveFloat | None = key(None, "Learning rate after the cold start; null: the same.")
    warmup_steps: Count = key(
        0,
        "Updates of this role over which the learning rate rises linearly from 0, constant after; the fake score's "
        "train.fake_updates per generator update count one by one.",
    )
    decay: Fraction = key(
        0.0, "Last share of the cold start, and of the updates after it, in which the rate falls linearly to a tenth."
    )
    betas: tuple[Fraction, Fraction] = key((0.9, 0.999), "Moment decays.")
    weight_decay: NonNegative = key(0.0, "Decoupled weight decay.")
    eps: PositiveFloat = key(1e-8, "Denominator term.")


class Optimizer(Section):
    """Optimizers of the trained roles."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = key(
        "adamw",
        "adamw: torch's; adamw_8bit: moments in 8 bits (bitsandbytes or torchao); paged_adamw_8bit: paged to the host.",
    )
    generator: AdamW = key(AdamW(), "The generator's.")
    fake: AdamW = key(AdamW(), "The fake score's.")
    clip: NonNegative = key(1.0, "Gradient-norm bound per role; 0: none.")


class DeepSpeed(Section):
    """How the engines run."""

    stage: Literal[0, 2, 3] = key(0, "ZeRO stage: 0 replicates, 2 shards gradients and optimizer, 3 weights too.")
    dtype: Literal["fp32", "bf16", "fp16"] = key(
        "fp32", "Compute type of the networks; master weights are fp32. fp16: with a dynamic loss scale, on GPUs."
    )
    config: File | None = key(None, "A DeepSpeed JSON whose keys come on top (offload, buckets, optimizer, ...).")


class Checkpoint(Section):
    """Checkpoints."""

    every: Positive = key(100, "Generator updates between checkpoints.")
    keep: Positive = key(2, "How many of the newest stay, beside the cold start's.")
    keep_every: Positive | None = key(None, "Checkpoints of steps that this divides stay, too; null: no more.")


class Export(Section):
    """The weights that a finished run leaves."""

    dtype: Literal["fp32", "bf16"] = key(
        "fp32", "Type of final/generator.safetensors, and of an exported pipeline's network unless told otherwise."
    )


class Log(Section):
    """Logs."""

    every: Positive = key(10, "Generator updates between log lines; metrics stay on the device in between.")
    report: bool = key(True, "Write report.html at the end.")
    wandb: str | None = key(None, "Weights & Biases project, when installed; null: none.")


class Evaluation(Section):
    """The evaluations: at the end metrics.json, while training evaluations.jsonl."""

    samples: Count = key(2000, "Samples per row; 0: no evaluation.")
    every: Count = key(
        0,
        "Generator updates between evaluations of the generator, with a sheet of its samples: evaluations.jsonl, "
        "samples/, TensorBoard; 0: at the end.",
    )
    data: Place | None = key(
        None,
        "Real images: digits, scenes, or a folder. null: no FD, and with class labels no evaluation at the end.",
    )
    prompts: File | None = key(
        None, "Prompts of the evaluation, as data.prompts, or scenes_eval; null: the first of data.prompts."
    )
    features: Place | None = key(
        None, "Feature classifier: digits, scenes, or folder or hub id of an image classifier."
    )
    teacher_steps: Positive = key(50, "Euler steps of the multi-step teacher.")
    batch_size: Positive = key(128, "Samples per rank and forward.")

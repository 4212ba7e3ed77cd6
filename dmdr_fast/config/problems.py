"""What single keys cannot tell: values that do not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmdr_fast.config import Config


def problems(config: Config) -> Iterator[str]:
    """One line for each fault, naming the key and the remedy; the first is the one that a user sees."""
    model, unit = config.model, config.decoder_factor * config.model.patch_size
    if model.resolution % unit:
        yield (
            f"model.resolution: {model.resolution} is not a multiple of {unit} "
            f"(decoder factor {config.decoder_factor} x model.patch_size {model.patch_size})"
        )
    if model.hidden_size % model.num_heads or model.hidden_size % 4:
        yield (
            f"model.hidden_size: {model.hidden_size} must be a multiple of 4 and of model.num_heads ({model.num_heads})"
        )
    if config.student.steps > config.student.grid_points:
        yield (
            f"student.steps: {config.student.steps} steps do not fit a grid of {config.student.grid_points} times; "
            "set student.steps to at most student.grid_points"
        )
    if config.teacher.weights is None and config.teacher.train.data is None:
        yield "teacher.weights: missing; name the teacher's weights, or set teacher.train.data to train one first"
    if config.train.cold_start_steps > config.train.generator_steps:
        yield (
            f"train.cold_start_steps: {config.train.cold_start_steps} is more than "
            f"train.generator_steps ({config.train.generator_steps}), the total"
        )
    if config.renoise.t_min >= config.renoise.t_max:
        yield f"renoise.t_min: {config.renoise.t_min} must be below renoise.t_max ({config.renoise.t_max})"
    uses_digits = [
        name
        for name, value in (
            ("teacher.train.data", None if config.teacher.weights else config.teacher.train.data),
            ("reward.kind", config.reward.kind),
            ("eval.data", config.eval.data),
            ("eval.features", config.eval.features),
        )
        if value == "digits"
    ]
    if uses_digits and (model.num_classes, model.resolution, model.channels) != (10, 8, 1):
        yield (
            f"model.num_classes: {uses_digits[0]}=digits has 10 classes of 8x8x1 images; the model is set to "
            f"num_classes {model.num_classes}, resolution {model.resolution}, channels {model.channels}"
        )
    if config.decoder.kind == "vae" and config.decoder.path is None:
        yield "decoder.path: missing; decoder.kind=vae needs the folder or hub id of an AutoencoderKL"
    if config.reward.kind == "classifier" and config.reward.path is None:
        yield "reward.path: missing; reward.kind=classifier needs the folder or hub id of an image classifier"
    if config.memory.frozen == "float8" and config.deepspeed.stage == 3:
        yield "memory.frozen: float8 weights cannot be partitioned; use int8, or deepspeed.stage 0 or 2"
    if config.eval.data is not None and config.eval.features is None:
        yield "eval.features: missing; eval.data needs a feature classifier (digits, or a folder or hub id)"
